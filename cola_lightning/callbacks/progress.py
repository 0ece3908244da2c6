"""The progress bar."""

from typing import Any

import lightning as L

from cola_lightning.private_apis import DescribedProgressBar


class Progress(DescribedProgressBar):
    """Lightning's bar, in optimizer steps of the whole run; by itself it counts micro-batches of an epoch."""

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.max_steps if self.trainer.max_steps > 0 else super().total_train_batches

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def training_description(self) -> str:
        return f"{'Training':{len(self.validation_description)}}"  # as wide as validation's, or the bar flickers
