"""Add the module's entries to a checkpoint, and adapt a checkpoint to the run that resumes from it."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from cola_lightning.checkpoints.restore import check_progress
from cola_lightning.errors import InputError
from cola_lightning.training.data_checks import rename_data_state
from cola_lightning.training.gradient_accumulation import rescale_progress
from cola_lightning.training.metrics import TokenLoss
from cola_lightning.training.resumed_settings import keep_patience
from cola_lightning.training.trainer_attributes import callbacks_of, datamodule_of

LOSS = "train_loss"
"""Key of the sums of the next logged mean loss: of the losses in nats, and of the tokens."""


def store_loss(trainer: L.Trainer, loss: TokenLoss, checkpoint: dict[str, Any]) -> None:
    """Store the sums of the next logged mean, over all ranks. All ranks call this."""
    sums = torch.stack([loss.loss_sum, loss.tokens])
    checkpoint[LOSS] = trainer.strategy.reduce(sums, reduce_op="sum").tolist()


def restore_loss(trainer: L.Trainer | None, loss: TokenLoss, checkpoint: dict[str, Any]) -> None:
    """Restore the sums of the next logged mean. They are of all ranks, so one rank takes them."""
    loss.reset()
    sums = torch.tensor(checkpoint.get(LOSS, (0.0, 0.0)), dtype=torch.float64)
    if trainer and trainer.is_global_zero and sums.any():
        loss.update(*sums.to(loss.loss_sum))


def adapt_checkpoint(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Check a checkpoint, and change in place what this run has otherwise: names, patience, micro-batches of a step.

    Raises:
        InputError: If its counts are not those of a run, or its weights are an average that this run does not keep.
    """
    check_progress(checkpoint, trainer)
    rename_data_state(datamodule_of(trainer), checkpoint)
    averages = any(isinstance(callback, WeightAveraging) for callback in callbacks_of(trainer))
    if trainer.state.fn == TrainerFn.FITTING and not averages and "current_model_state" in checkpoint:
        # The stored weights are the average, and the stored optimizer state belongs to other weights.
        raise InputError(
            "the checkpoint holds an average of weights, of the callback WeightAveraging or EMAWeightAveraging, "
            "which is not among --trainer.callbacks; name it again to go on"
        )
    keep_patience(trainer, checkpoint.get("callbacks", {}))
    if "micro_batches" in checkpoint and "loops" in checkpoint:
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        rescale_progress(progress, checkpoint["micro_batches"], trainer.accumulate_grad_batches)
