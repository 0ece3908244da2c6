"""Find the checkpoint that ``--ckpt_path`` means, and check its weights."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from cola_lightning.checkpoints import check_no_code, find_corruption
from cola_lightning.checkpoints.formats import weights_in_parts
from cola_lightning.checkpoints.latest import latest_valid
from cola_lightning.checkpoints.pretrained import check_finite
from cola_lightning.errors import InputError, UnusableModelError


def find_checkpoint(config: Any, command: str) -> Path | None:
    """Return the checkpoint to load; None if a run is to go on from its last and has none yet.

    Args:
        config: Settings of the command.
        command: Its name.

    Raises:
        InputError: If there is no such checkpoint, or it is damaged or holds code.
    """
    if config.ckpt_path == "last":
        return _find_last(config, command)
    path = Path(config.ckpt_path)
    if not path.exists():
        raise InputError(f"--ckpt_path {path} is not there; name a checkpoint, or the run's newest by --ckpt_path last")
    check_no_code(path)
    if problem := find_corruption(path):
        raise InputError(
            f"--ckpt_path {path} is damaged: {problem}; name another, or take the newest that is whole by "
            "--ckpt_path last"
        )
    return path


def _find_last(config: Any, command: str) -> Path | None:
    folder = config.checkpoint.dirpath or (config.run_dir and Path(config.run_dir, "checkpoints"))
    if folder is None:
        raise InputError("--ckpt_path last needs to know of which run; set --run_dir, or name the checkpoint")
    path: Path | None = latest_valid(Path(folder))
    if path:
        check_no_code(path)
    elif command != "fit":
        raise InputError(f"--ckpt_path last finds no checkpoint in {folder}; train first, or set --run_dir")
    else:
        rank_zero_info(f"No checkpoint in {folder} yet: the run begins")
    return path


def check_weights(path: Path) -> None:
    """Check that a checkpoint's weights are finite.

    Raises:
        InputError: If they hold NaN or infinity.
    """
    for weights in weights_in_parts(path):
        try:
            check_finite(weights, path)
        except UnusableModelError as error:
            raise InputError(f"{error}, or add --allow_nan true") from error


def class_paths(settings: Any) -> list[str]:
    """List the import paths of classes in settings, at any depth."""
    if isinstance(settings, list):
        return [path for each in settings for path in class_paths(each)]
    if not isinstance(settings, dict):
        return []
    own = [settings["class_path"]] if isinstance(settings.get("class_path"), str) else []
    return own + [path for each in settings.values() for path in class_paths(each)]
