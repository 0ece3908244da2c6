"""When validation runs: every ``val_check_interval`` optimizer steps, and after the last step of a run.

``pending_validation`` adds the validation that a stopped run did not finish.
"""

from typing import Any

import lightning as L

from cola_lightning.errors import InputError
from cola_lightning.private_apis.lightning import is_accumulating, is_last_batch


def count_interval_in_micro_batches(trainer: L.Trainer, micro_batches: int, counted_before: int = 1) -> None:
    """Convert ``val_check_interval`` from optimizer steps, which the user states, to micro-batches, which Lightning
    counts. So a run validates at the same steps on any number of devices.

    Args:
        trainer: The trainer.
        micro_batches: Micro-batches of an optimizer step.
        counted_before: Micro-batches of a step in an earlier conversion, which this one replaces.
    """
    interval: Any = getattr(trainer, "val_check_interval", None)  # absent if it is a length of time
    if isinstance(interval, int):
        trainer.val_check_interval = interval // counted_before * micro_batches


def is_last_step(trainer: L.Trainer) -> bool:
    """Return whether the run validates and ends after the step just made, by ``max_steps`` or ``max_epochs``."""
    if not trainer.enable_validation or trainer.global_step == 0 or is_accumulating(trainer):
        return False
    if trainer.global_step == trainer.max_steps:
        return True
    epochs = trainer.max_epochs
    return epochs is not None and epochs != -1 and is_last_batch(trainer) and trainer.current_epoch + 1 >= epochs


def setup_data_with_shorter_interval(trainer: L.Trainer) -> None:
    """Load the training data as ``fit_loop.run`` does, with a ``val_check_interval`` that is not longer than the run.

    Lightning refuses an interval that is longer than an epoch, and here the run is one epoch. Afterwards the interval
    is what it was.

    Raises:
        InputError: If the data has shorter epochs than the run, and these are shorter than the interval.
    """
    interval: Any = getattr(trainer, "val_check_interval", None)  # absent if it is a length of time
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
