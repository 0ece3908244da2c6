"""Seed every step, so that dropout is the same in a resumed run."""

from typing import Any

import lightning as L
import torch

from cola_lightning.methods.post_step import mixed_seed
from cola_lightning.private_apis.lightning import global_seed


class StepSeed(L.Callback):
    """Seed torch before each micro-batch, from the run's seed, the step, the micro-batch and the rank.

    Without it, dropout of a resumed run differs from that of a run without a break, because Lightning does not store
    the state of the random generator.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(mixed_seed(global_seed(), trainer.global_step, batch_idx, trainer.global_rank))
