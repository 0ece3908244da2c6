"""The progress bar."""

from typing import Any

import lightning as L
from rich import get_console

from cola_lightning.private_apis import DescribedProgressBar


class Progress(DescribedProgressBar):
    """Show optimizer steps of the whole run, where Lightning's bar shows micro-batches of an epoch.

    Without a terminal there is no bar; ``LogLines`` writes lines instead.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not get_console().is_terminal:
            self.disable()

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.max_steps if self.trainer.max_steps > 0 else super().total_train_batches

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.teardown(trainer, pl_module, "fit")  # draws the bar for the last time, before the summary of the run

    def training_description(self) -> str:
        return f"{'Training':{len(self.validation_description)}}"  # as wide as validation's
