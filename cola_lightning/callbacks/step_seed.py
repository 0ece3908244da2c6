"""Seeds every step, so that dropout draws the same when a run is resumed."""

from typing import Any

import lightning as L
import torch

from cola_lightning.methods.post_step import mixed_seed
from cola_lightning.private_apis import global_seed


class StepSeed(L.Callback):
    """Makes what a training step draws (dropout) depend on the run's seed, the step, the batch and the rank alone.

    Without it Lightning goes on, when a run is resumed, from wherever the generator happens to stand.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(mixed_seed(global_seed(), trainer.global_step, batch_idx, trainer.global_rank))
