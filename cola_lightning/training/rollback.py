"""Going back to a checkpoint while a run goes on."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from cola_lightning.checkpoints.formats import read_state
from cola_lightning.checkpoints.latest import written
from cola_lightning.checkpoints.manifest import find_corruption
from cola_lightning.errors import InputError
from cola_lightning.private_apis import set_last_saved_step, set_logged_step


def find_checkpoint(trainer: L.Trainer, step: int) -> Path:
    """The newest checkpoint of this run that is whole and not after ``step``; if all are after it, the oldest of them.

    Rank 0 looks, all ranks take part and get the same answer.

    Raises:
        InputError: On every rank, if there is none.
    """
    found = str(_look(trainer, step) or "") if trainer.is_global_zero else ""
    found = trainer.strategy.broadcast(found)
    if not found:
        raise InputError(
            "there is no checkpoint of this run to go back to; write them more often, by "
            "--checkpoint.every_n_train_steps, and not save_weights_only"
        )
    return Path(found)


def _look(trainer: L.Trainer, step: int) -> Path | None:
    paths: set[Path] = set()
    callback: Any
    for callback in trainer.checkpoint_callbacks:  # of which ours need not be the first
        named = (getattr(callback, name, None) for name in ("last_model_path", "best_model_path"))
        paths |= {Path(path).resolve() for path in named if path}
        if getattr(callback, "dirpath", None):
            paths |= {path.resolve() for path in written(Path(callback.dirpath))}
    steps = {path: made for path in paths if (made := _step(path)) is not None}
    before = sorted((path for path in steps if steps[path] <= step), key=steps.__getitem__, reverse=True)
    after = sorted((path for path in steps if steps[path] > step), key=steps.__getitem__)
    for path in before + after:
        if (problem := find_corruption(path)) is None:
            return path
        rank_zero_warn(f"{path} is damaged ({problem}), and passed over")
    return None


def _step(path: Path) -> int | None:
    """The optimizer steps behind a checkpoint, None where one cannot go on from it."""
    try:
        state = read_state(path)
    except InputError as error:
        rank_zero_warn(str(error))
        return None
    return state["global_step"] if "loops" in state and "lr_schedulers" in state else None


def restore_checkpoint(trainer: L.Trainer, path: Path, exclude: type[Callback]) -> None:
    """Set network, optimizer, schedule, step count and callbacks to what they were in a checkpoint; called on all ranks
    before a batch is trained on. The position in the data stays, and with it Lightning's count of batches; of the
    callbacks, those that write checkpoints and ``kept`` stay as they are.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    checkpoint = strategy.load_checkpoint(path, weights_only=True)  # under FSDP this loads weights and optimizer too
    module.on_load_checkpoint(checkpoint)
    strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
    if strategy.lightning_restore_optimizer:
        strategy.load_optimizer_state_dict(checkpoint)
    module.restore_settings()  # the schedule too
    for callback in trainer.callbacks:
        if not isinstance(callback, Checkpoint | exclude):
            callback.on_load_checkpoint(trainer, module, checkpoint)
            if callback.state_key in checkpoint["callbacks"]:
                callback.load_state_dict(deepcopy(checkpoint["callbacks"][callback.state_key]))
    loop = trainer.fit_loop.epoch_loop
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
    loop.automatic_optimization.optim_progress.load_state_dict(progress)
    set_logged_step(trainer, trainer.global_step)
    # A checkpoint at a step that is passed again is written again.
    for callback in trainer.checkpoint_callbacks:
        set_last_saved_step(callback, trainer.global_step)
