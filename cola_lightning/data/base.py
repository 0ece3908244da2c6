"""What every data module of this package does alike."""

import warnings
from typing import Any

import lightning as L
from torch.utils.data import Dataset

from cola_lightning.data.loader import EvalLoader
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError


def rows_of_a_step(rows: int | None, tokens: int | None, sequence_length: int) -> int | None:
    """Rows of an optimizer step, stated in rows or in tokens; None if in neither.

    Raises:
        InputError: If it is stated in both, or the tokens are no whole number of rows.
    """
    if tokens is None:
        return rows
    if rows is not None:
        raise InputError(
            f"--data.global_batch_size {rows} and --data.global_batch_tokens {tokens} both state the batch; set one of "
            f"them to null"
        )
    rows, left = divmod(tokens, sequence_length)
    if left or rows < 1:
        nearest = [n * sequence_length for n in (rows, rows + 1) if n > 0]
        raise InputError(
            f"--data.global_batch_tokens {tokens} is no multiple of --data.sequence_length {sequence_length}; the "
            f"nearest that are: {' and '.join(map(str, nearest))}"
        )
    return rows


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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin at the position that ``state_dict`` of the subclass returned."""
        # Lightning knows only loaders that keep one state for all ranks, and warns of any other.
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable")

    def _share(self) -> dict[str, int]:
        """Which part of the data this process takes."""
        assert self.trainer is not None
        ranks: dict[str, Any] = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return {"replicas": ranks["num_replicas"], "rank": ranks["rank"]}
