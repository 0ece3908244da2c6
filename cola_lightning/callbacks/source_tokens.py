"""Documents and tokens that a run has read from each data source."""

from typing import Any

import lightning as L
import torch

from cola_lightning.distributed.precision import widest_float
from cola_lightning.training.log_steps import at_log_step
from cola_lightning.training.trainer_attributes import datamodule_of


class SourceTokenCounter(L.Callback):
    """Logs ``data/SOURCE/documents`` and ``data/SOURCE/tokens`` of a :class:`StreamingDataModule`: what the run took
    from each source since it began, over all ranks. Other data modules have no such counts. The counts are part of the
    data module's state and resume with it."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = datamodule_of(trainer)
        if not at_log_step(trainer) or not hasattr(data, "source_counts"):
            return
        sources = data.source_counts()
        names = [f"data/{source}/{kind}" for source, counts in sources.items() for kind in counts]
        device = trainer.strategy.root_device
        counts = torch.tensor(
            [count for counts in sources.values() for count in counts.values()],
            dtype=widest_float(device),
            device=device,
        )
        totals = trainer.strategy.reduce(counts, reduce_op="sum")
        pl_module.log_dict(dict(zip(names, totals.tolist(), strict=True)))
