"""Restore an earlier checkpoint within a running process."""

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from cola_lightning.checkpoints.formats import read_state
from cola_lightning.checkpoints.latest import written
from cola_lightning.checkpoints.manifest import find_corruption
from cola_lightning.checkpoints.restore import explain_restore
from cola_lightning.errors import InputError
from cola_lightning.private_apis.lightning import set_last_saved_step, set_logged_step
from cola_lightning.training.trainer_attributes import callbacks_of

if TYPE_CHECKING:
    from cola_lightning.training.module import LanguageModel


def find_checkpoint(trainer: L.Trainer, step: int) -> Path:
    """Find the newest undamaged checkpoint of this run at ``step`` or before; if there is none, the oldest after it.

    All ranks call this. Rank 0 reads the disk, and all ranks return its answer.

    Raises:
        InputError: On every rank, if the run has no checkpoint.
    """
    found = str(_find_on_disk(trainer, step) or "") if trainer.is_global_zero else ""
    found = trainer.strategy.broadcast(found)
    if not found:
        raise InputError(
            "there is no checkpoint of this run to go back to; write them more often, by "
            "--checkpoint.every_n_train_steps, and not save_weights_only"
        )
    return Path(found)


def _find_on_disk(trainer: L.Trainer, step: int) -> Path | None:
    paths: set[Path] = set()
    callback: Any
    for callback in trainer.checkpoint_callbacks:  # Checkpoints, and any ModelCheckpoint that the user added
        named = (getattr(callback, name, None) for name in ("last_model_path", "best_model_path"))
        paths |= {Path(path).resolve() for path in named if path}
        if getattr(callback, "dirpath", None):
            paths |= {path.resolve() for path in written(Path(callback.dirpath))}
    # Prefer the newest state before the fault. If all checkpoints are later, the oldest is the next best: the fault may
    # not be in it yet.
    steps = {path: made for path in paths if (made := _step(path)) is not None}
    before = sorted((path for path in steps if steps[path] <= step), key=steps.__getitem__, reverse=True)
    after = sorted((path for path in steps if steps[path] > step), key=steps.__getitem__)
    for path in before + after:
        if (problem := find_corruption(path)) is None:
            return path
        rank_zero_warn(f"{path} is damaged ({problem}), so it is skipped")
    return None


def _step(path: Path) -> int | None:
    """Return the optimizer steps of a checkpoint; None if it lacks what training needs to go on."""
    try:
        state = read_state(path)
    except InputError as error:
        rank_zero_warn(str(error))
        return None
    return state["global_step"] if "loops" in state and "lr_schedulers" in state else None


def restore_checkpoint(trainer: L.Trainer, path: Path, exclude: type[Callback]) -> None:
    """Restore network, optimizer, schedule, step count and callbacks from a checkpoint.

    All ranks call this, between two optimizer steps. The position in the data and Lightning's count of batches stay.

    Args:
        trainer: The trainer.
        path: The checkpoint.
        exclude: A class of callbacks that keep their state. Callbacks that write checkpoints keep theirs too.

    Raises:
        InputError: If the checkpoint does not fit the run.
    """
    with explain_restore(lambda: path):
        _restore(trainer, path, exclude)


def _restore(trainer: L.Trainer, path: Path, exclude: type[Callback]) -> None:
    strategy = trainer.strategy
    module = cast("LanguageModel", trainer.lightning_module)
    # 1. Weights and optimizer, in the order in which Lightning restores. The module's hook changes what was read, so it
    #    runs before that is loaded. Under FSDP the first line loads weights and optimizer, and leaves the rest.
    checkpoint = strategy.load_checkpoint(path, weights_only=True)
    module.on_load_checkpoint(checkpoint)
    strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
    if strategy.lightning_restore_optimizer:
        strategy.load_optimizer_state_dict(checkpoint)
    # 2. Settings and schedule of this run, and the callbacks. A callback gets a copy, because it may keep the dict.
    module.checkpoint_state.restore_settings()  # also brings the schedule to its step
    for callback in callbacks_of(trainer):
        if not isinstance(callback, Checkpoint | exclude):
            callback.on_load_checkpoint(trainer, module, checkpoint)
            if callback.state_key in checkpoint["callbacks"]:
                callback.load_state_dict(deepcopy(checkpoint["callbacks"][callback.state_key]))
    # 3. The count of optimizer steps, which trainer.global_step reads. The counts of batches stay, because the data
    #    goes on: the batches since the checkpoint are not trained on again.
    loop = trainer.fit_loop.epoch_loop
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
    loop.automatic_optimization.optim_progress.load_state_dict(progress)
    set_logged_step(trainer, trainer.global_step)
    # Steps after this one are made again, so their checkpoints are written again.
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            set_last_saved_step(callback, trainer.global_step)
