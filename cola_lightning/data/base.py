"""What every data module of this package does alike."""

from typing import Any

import lightning as L
from torch.utils.data import Dataset

from cola_lightning.data.loader import EvalLoader
from cola_lightning.data.tokenizer import Tokenizer


class TokenDataModule(L.LightningDataModule):
    """Evaluates on ``validation_rows``, each row once over all ranks; a subclass makes those rows and trains.

    Attributes:
        tokenizer: What made the ids; there after ``setup``.
        validation_rows: Held-out rows; there after ``setup``.
        batch_size: Rows of a micro-batch on one device (B).
        global_batch_size: Rows of an optimizer step over all devices, or None.
        sequence_length: Tokens of a row (T).
    """

    tokenizer: Tokenizer
    validation_rows: Dataset
    batch_size: int
    global_batch_size: int | None
    sequence_length: int

    def val_dataloader(self) -> EvalLoader:
        return EvalLoader(self.validation_rows, self.batch_size, **self._share())

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _share(self) -> dict[str, int]:
        """Which part of the data this process takes."""
        assert self.trainer is not None
        ranks: dict[str, Any] = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return {"replicas": ranks["num_replicas"], "rank": ranks["rank"]}
