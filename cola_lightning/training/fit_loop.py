"""Lightning's fit loop, for runs that are counted in optimizer steps.

Lightning counts batches within epochs. A loader of this package gives the batches of the whole run, so that one epoch
is the run, and its length is ``max_steps``. Three things do not follow from that by themselves:

1. A run of 3 steps with ``val_check_interval=100`` is an epoch shorter than the interval, which Lightning refuses.
2. The last model is validated only where the number of steps is a multiple of the interval.
3. A checkpoint of a run of 12 steps says that its epoch is over. With ``max_steps=20`` the same epoch has 20 batches,
   of which 12 are made. With another number of micro-batches per step it has another length again.
"""

from typing import Any

import lightning as L

from cola_lightning.errors import InputError
from cola_lightning.private_apis import is_accumulating, is_last_batch, validate_also


def prepare_fit_loop(trainer: L.Trainer) -> None:
    """Make the next ``fit_loop.run`` of this trainer do the three things above. Called in ``on_fit_start``.

    Raises:
        InputError: From ``fit_loop.run``, if a loader with epochs shorter than the run is also shorter than
            ``val_check_interval``.
    """
    loop = trainer.fit_loop
    inner = loop.run  # Lightning's method, or what a callback has put in its place

    def run() -> None:
        vars(loop).pop("run", None)
        _setup_data(trainer)
        align_progress(trainer)
        with validate_also(trainer, lambda: is_last_step(trainer)):
            inner()

    vars(loop)["run"] = run


def is_last_step(trainer: L.Trainer) -> bool:
    """Whether the run ends after the optimizer step just made, by ``max_steps`` or ``max_epochs``, and validates."""
    if not trainer.enable_validation or trainer.global_step == 0 or is_accumulating(trainer):
        return False
    if trainer.global_step == trainer.max_steps:
        return True
    limited = trainer.max_epochs is not None and trainer.max_epochs != -1
    return limited and is_last_batch(trainer) and trainer.current_epoch + 1 >= trainer.max_epochs


def _setup_data(trainer: L.Trainer) -> None:
    """Load the training data as ``fit_loop.run`` would, with an interval that is not longer than the run."""
    interval: Any = getattr(trainer, "val_check_interval", None)  # absent where it is a length of time
    if isinstance(interval, int):
        trainer.val_check_interval = min(interval, trainer.max_steps * trainer.accumulate_grad_batches)
    try:
        trainer.fit_loop.setup_data()
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        raise InputError(
            f"--trainer.val_check_interval {interval} is more than the {trainer.fit_loop.max_batches} batches of an "
            "epoch of this data; lower it, or count through all epochs by --trainer.check_val_every_n_epoch null"
        ) from error
    finally:
        if interval is not None:
            trainer.val_check_interval = interval


def align_progress(trainer: L.Trainer) -> None:
    """Set the count of batches of a resumed run to what its optimizer steps took, where one epoch is the run.

    Example: a checkpoint of step 12 of 12, made with 4 micro-batches a step, says "batch 48, the last of its epoch".
    Going on to step 20 with 2 micro-batches a step, the epoch has 40 batches, and batch 24 is behind.
    """
    loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    made = trainer.global_step * trainer.accumulate_grad_batches
    whole_run = trainer.max_steps * trainer.accumulate_grad_batches
    if not loop.is_resuming or loop.max_batches != whole_run or not 0 < made < whole_run:
        return
    # As Lightning's own state is in ``on_train_batch_end`` in the middle of the first epoch: the batch is processed,
    # and not yet completed.
    current, total = epoch_loop.batch_progress.current, epoch_loop.batch_progress.total
    current.ready = current.started = current.processed = made
    for count in (current, total):
        count.completed = count.processed - 1
    epoch_loop.batch_progress.is_last_batch = False
    for count in (loop.epoch_progress.current, loop.epoch_progress.total):
        count.ready = count.started = 1
        count.processed = count.completed = 0
