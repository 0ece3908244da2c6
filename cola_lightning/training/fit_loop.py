"""Lightning's fit loop, for runs that are counted in optimizer steps.

Lightning counts batches within epochs. A loader of this package gives the batches of the whole run, so the run is one
epoch, and ``max_steps`` is its length. Lightning's loop does not handle three things of such a run:

1. It refuses a run that is shorter than ``val_check_interval``, because an epoch must not be shorter.
2. It validates the last model only if the number of steps is a multiple of the interval.
3. A checkpoint of a run of 12 steps says that its epoch is over. If the run goes on to step 20, the same epoch has 20
   batches, of which 12 are done. Another number of micro-batches per step changes the length of the epoch too.
"""

from collections.abc import Callable
from typing import Any

import lightning as L

from cola_lightning.private_apis.lightning import validate_also
from cola_lightning.training.validation_schedule import is_last_step, setup_data_with_shorter_interval


def prepare_fit_loop(trainer: L.Trainer) -> None:
    """Let the next ``fit_loop.run`` of a trainer handle the three things above; called in ``on_fit_start``.

    ``fit_loop.run`` raises :class:`~cola_lightning.errors.InputError` if the data has epochs that are shorter than the
    run and shorter than ``val_check_interval``.
    """

    def run(fit: Callable[[], None]) -> None:
        setup_data_with_shorter_interval(trainer)
        align_progress(trainer)
        with validate_also(trainer, lambda: is_last_step(trainer)):
            fit()

    wrap_next_run(trainer, run)


def wrap_next_run(trainer: L.Trainer, around: Callable[[Callable[[], None]], None]) -> None:
    """Let the next ``fit_loop.run()`` call ``around(run)`` in its place. Of several wrappers, the last is outermost."""
    loop = trainer.fit_loop
    inner = loop.run  # the method, or an earlier wrapper

    def run() -> None:
        vars(loop).pop("run", None)
        around(inner)

    # An attribute of the object hides the method of its class. ``run`` above deletes it, so it acts once.
    vars(loop)["run"] = run


def align_progress(trainer: L.Trainer) -> None:
    """Set the count of batches of a resumed run from its optimizer steps, if the run is one epoch.

    Example: a checkpoint of step 12 of 12, made with 4 micro-batches a step, says "batch 48, the last of its epoch". A
    run that goes on from it to step 20 with 2 micro-batches a step has 40 batches, of which 24 are done.
    """
    loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    made = trainer.global_step * trainer.accumulate_grad_batches
    whole_run = trainer.max_steps * trainer.accumulate_grad_batches
    if not loop.is_resuming or loop.max_batches != whole_run or not 0 < made < whole_run:
        return
    # Write what Lightning's own state is in ``on_train_batch_end`` in the middle of the first epoch: the batch is
    # processed and not yet completed, the epoch is started and not yet processed.
    batch_progress: Any = epoch_loop.batch_progress
    current, total = batch_progress.current, batch_progress.total
    current.ready = current.started = current.processed = made
    for count in (current, total):
        count.completed = count.processed - 1
    batch_progress.is_last_batch = False
    epoch_progress: Any = loop.epoch_progress
    for count in (epoch_progress.current, epoch_progress.total):
        count.ready = count.started = 1
        count.processed = count.completed = 0
