"""What a run leaves beside its checkpoints, so that they can be used and described without it."""

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
from cola_lightning.errors import InputError
from cola_lightning.stored_data import check_stored

RUN, TOKENIZER = "run.json", "tokenizer"
LIBRARIES = ("cola-lightning", "torch", "lightning", "deepspeed", "tokenizers", "datasets")


def run_folder(trainer: L.Trainer) -> Path:
    """The directory that everything of a run goes into, the same on all ranks; all ranks call it.

    It is ``--run_dir``, whatever the logger. A run that was given none has its logger's directory, if that is a folder
    of this run alone, else the trainer's ``default_root_dir``.
    """
    folder = getattr(trainer, "run_dir", None)
    if folder is None:
        logger = trainer.loggers[0] if trainer.loggers else None
        own = isinstance(logger, TensorBoardLogger | CSVLogger)
        folder = logger.log_dir if own else trainer.default_root_dir
    return Path(trainer.strategy.broadcast(str(folder)))


def write_provenance(trainer: L.Trainer, folder: Path) -> None:
    """Write the tokenizer, and ``run.json`` with the commit, the versions of libraries and what the data is."""
    folder.mkdir(parents=True, exist_ok=True)
    data = getattr(trainer, "datamodule", None)
    tokenizer = getattr(data, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)
    facts = {"commit": commit(), "devices": trainer.world_size, "libraries": libraries()}
    facts["data"] = getattr(data, "identity", None)
    (folder / RUN).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def libraries() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on, of those installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this package's source, marked where files differ from it; None outside a git checkout of it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        if not git("ls-files", "--", Path(__file__).name):  # installed within some other repository
            return None
        return git("rev-parse", "HEAD") + (", with changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


class _Data(TypedDict, total=False):
    sources: list[StoredSource]


class _Run(TypedDict, total=False):
    """What ``run.json`` says, as far as it is used."""

    commit: str | None
    libraries: dict[str, str]
    data: _Data | None


def read_provenance(run_dir: Path | None) -> dict[str, Any]:
    """What ``run.json`` says; nothing where there is none.

    Raises:
        InputError: If it is not what a run writes.
    """
    file = run_dir / RUN if run_dir else None
    if file is None or not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file} cannot be read as JSON: {error}; remove it, and its facts are not recorded"
        ) from error
    check_stored(content, _Run, file, "remove the file, to do without its facts")
    return content
