"""Store state of the module in a checkpoint, and take it from one when a run resumes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cola_lightning.checkpoints.restore import check_progress, first_step_explained
from cola_lightning.errors import InputError
from cola_lightning.training.data_checks import rename_data_state
from cola_lightning.training.gradient_accumulation import rescale_progress
from cola_lightning.training.metrics import TokenLoss
from cola_lightning.training.resumed_settings import Group, OptimizerSettings, keep_patience
from cola_lightning.training.trainer_attributes import callbacks_of, datamodule_of

LOSS = "train_loss"
"""Key of the sums of the next logged mean loss: of the losses in nats, and of the tokens."""


class CheckpointState:
    """The entries of a module in checkpoints, and what it remembers of the checkpoint that it was loaded from.

    Args:
        has_weights: Whether the network begins with the weights of a folder, not with random ones.

    Attributes:
        has_weights: Whether the network has other weights than random ones, or is being trained.
    """

    def __init__(self, has_weights: bool) -> None:
        self.has_weights = has_weights
        self._settings: OptimizerSettings  # of this run; set when the optimizer is made
        self._stored_classes: list[str] | None = None  # of the optimizer of the run that wrote the checkpoint …
        self._stored_settings: list[Group] | None = None  # … and its settings
        self._stored_position = 0  # steps of the schedule of that run
        self._is_restored = False  # a checkpoint was loaded, and no step made since

    def set_optimizer(self, optimizer: Optimizer, schedule: LRScheduler) -> None:
        """Record the settings of this run's optimizer and schedule, before a checkpoint replaces them."""
        self._settings = OptimizerSettings(optimizer, schedule)

    def store(self, trainer: L.Trainer, loss: TokenLoss, checkpoint: dict[str, Any]) -> None:
        """Store the sums of the next logged mean over all ranks, and what :meth:`load` compares. All ranks call this.

        Args:
            trainer: The trainer.
            loss: Losses since the last logged mean, on this rank.
            checkpoint: The checkpoint, to which entries are added.
        """
        store_loss(trainer, loss, checkpoint)
        checkpoint["optimizer_classes"] = self._settings.classes
        checkpoint["optimizer_settings"] = self._settings.groups
        checkpoint["micro_batches"] = trainer.accumulate_grad_batches

    def load(self, trainer: L.Trainer | None, loss: TokenLoss, checkpoint: dict[str, Any]) -> None:
        """Take what :meth:`store` wrote. Lightning loads the rest of the checkpoint afterwards.

        Args:
            trainer: The trainer, to whose run the checkpoint is adapted; None if the module has none.
            loss: Takes the sums of the next logged mean.
            checkpoint: The checkpoint, which is changed in place.

        Raises:
            InputError: If the checkpoint does not fit the run.
        """
        if trainer:
            adapt_checkpoint(trainer, checkpoint)
        self._stored_classes = checkpoint.get("optimizer_classes")
        self._stored_settings = checkpoint.get("optimizer_settings")
        self._is_restored = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if schedules := checkpoint.get("lr_schedulers"):
            # The stored schedule may be of another class. ``restore_settings`` steps the schedule of this run instead.
            self._stored_position, checkpoint["lr_schedulers"] = schedules[0]["last_epoch"], []
        self.has_weights = True
        restore_loss(trainer, loss, checkpoint)

    def restore_settings(self) -> None:
        """Replace settings of optimizer and schedule that a checkpoint brought by those of this run."""
        if self._stored_classes is not None:
            self._settings.warn_of_other_classes(self._stored_classes)
        self._settings.restore(self._stored_settings, self._stored_position)

    @contextmanager
    def explain_first_step(self, path: object) -> Iterator[None]:
        """Explain in one line why the optimizer cannot continue, if this is the first step after a restore.

        Args:
            path: The checkpoint, for the message.
        """
        with first_step_explained(path) if self._is_restored else nullcontext():
            yield
        self._is_restored = False

    def warn_if_untrained(self, trainer: L.Trainer) -> None:
        """Warn if a command other than ``fit`` runs with random weights."""
        command = trainer.state.fn
        if not self.has_weights and command and command != TrainerFn.FITTING:
            rank_zero_warn(
                f"The network is untrained: {command.value} was given no checkpoint, so its weights are "
                "those that training would begin with; name one by --ckpt_path"
            )


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
