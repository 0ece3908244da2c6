"""Write and read the facts of a run: its commit, libraries, data and tokenizer.

They lie beside its checkpoints, so that these can be used and described later.
"""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from typing_extensions import TypedDict

from cola_lightning.data.identity import StoredSource
from cola_lightning.output_files import write_whole
from cola_lightning.stored_data import read_json

RUN, TOKENIZER = "run.json", "tokenizer"
"""Names of the file of facts and of the tokenizer's folder, in the folder of a run."""

LIBRARIES = ("cola-lightning", "torch", "lightning", "deepspeed", "tokenizers", "datasets")


def run_folder(trainer: L.Trainer) -> Path:
    """Return the directory of a run, the same on all ranks. All ranks must call this.

    It is ``--run_dir``, if that is set. If not, it is the directory of the first logger, if that logger makes one for
    each run. Otherwise it is the trainer's ``default_root_dir``.
    """
    folder = getattr(trainer, "run_dir", None)
    if folder is None:
        logger = trainer.loggers[0] if trainer.loggers else None
        folder = logger.log_dir if isinstance(logger, TensorBoardLogger | CSVLogger) else trainer.default_root_dir
    return Path(trainer.strategy.broadcast(str(folder)))


def write_provenance(trainer: L.Trainer, folder: Path) -> None:
    """Write the tokenizer, and ``run.json`` with the commit, the versions of libraries and the identity of the data."""
    folder.mkdir(parents=True, exist_ok=True)
    data = getattr(trainer, "datamodule", None)
    tokenizer = getattr(data, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)
    facts = {"commit": commit(), "devices": trainer.world_size, "libraries": libraries()}
    facts["data"] = getattr(data, "identity", None)
    write_whole(folder / RUN, json.dumps(facts, indent=2) + "\n")


def libraries() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit of this package's source, with ", with changes" if files differ from it.

    Returns:
        None if the package does not run from a git checkout.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        if not git("ls-files", "--", Path(__file__).name):  # the package is installed inside another repository
            return None
        return git("rev-parse", "HEAD") + (", with changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


class _Data(TypedDict, total=False):
    sources: list[StoredSource]


class _Run(TypedDict, total=False):
    """The part of ``run.json`` that this package reads."""

    commit: str | None
    libraries: dict[str, str]
    data: _Data | None


def read_provenance(run_dir: Path | None) -> dict[str, Any]:
    """Read ``run.json`` in the directory of a run; empty if there is no such file.

    Raises:
        InputError: If its content is not of a run.
    """
    file = run_dir / RUN if run_dir else None
    if file is None or not file.is_file():
        return {}
    return read_json(file, "remove the file, to do without its facts", _Run)
