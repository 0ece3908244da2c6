"""Loaders of rows that are all on disk: for training in an order that depends on seed and position, and for evaluation.

Lightning sees objects with a length and an iterator, nothing more. So it neither replaces the sampler, nor fetches a
batch ahead, nor restores one rank's position on all ranks.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from cola_lightning.data.packing import IGNORE, Batch, Row, add_step_tokens
from cola_lightning.data.transfer import SentBatch
from cola_lightning.data.worker_process import start_loader


@dataclass(eq=False)
class TrainLoader:
    """The whole training run as one sequence of batches: pass after pass over the rows, each in a new order.

    Global batch ``b`` takes the sequence's entries from ``b * G`` on, G = ``batch_size * replicas``, and each rank
    takes its own ``batch_size`` of them. A position counted in rows therefore means the same for any number of ranks.

    Example: 10 rows, batches of 2 on 2 ranks. The sequence is the shuffled rows of pass 0, then those of pass 1, and so
    on. Global batch 2 has entries 8 to 11, so rank 1 has entries 10 and 11, which are entries 0 and 1 of pass 1.

    Every iteration continues where the last one ended, because an epoch of Lightning is a part of the run.

    Args:
        rows: The data set.
        batch_size: Rows of a batch on one rank (B).
        batches: Batches of the run on this rank, which is the loader's length.
        seed: Decides the order.
        position: Rows, over all ranks, that were trained on before.
        replicas: Number of ranks that share the data.
        rank: This rank.
        workers: Processes that read ahead; 0 for none.
        batches_per_step: Batches of an optimizer step. They are fetched together, so that each has the step's tokens.
        overfit: Begin every iteration with the first rows, in their own order; for ``overfit_batches``.
    """

    rows: Dataset
    batch_size: int
    batches: int
    _: KW_ONLY
    seed: int
    position: int = 0
    replicas: int = 1
    rank: int = 0
    workers: int = 0
    batches_per_step: int = 1
    overfit: bool = False

    def __post_init__(self) -> None:
        self._permutation = lru_cache(maxsize=2)(self._shuffled)  # a batch may reach from one pass into the next

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        if self.overfit:
            self.position = 0
        batches = _loader(self.rows, self._indices(), self.workers)
        while True:
            for batch in add_step_tokens(list(islice(batches, self.batches_per_step))):
                # Counted before the yield, so that a checkpoint taken after this batch resumes at the next.
                self.position += self.batch_size * self.replicas
                yield batch

    def _indices(self) -> Iterator[list[int]]:
        start = self.position + self.rank * self.batch_size
        while True:
            yield [self._row(index) for index in range(start, start + self.batch_size)]
            start += self.batch_size * self.replicas

    def _row(self, index: int) -> int:
        turn, within = divmod(index, len(self.rows))  # type: ignore[arg-type]
        if self.overfit:
            return within
        return int(self._permutation(turn)[within])

    def _shuffled(self, turn: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        return torch.randperm(len(self.rows), generator=generator)  # type: ignore[arg-type]


@dataclass(eq=False)
class EvalLoader:
    """Gives every row exactly once over all ranks, in order, and the same number of batches to each rank.

    If the rows do not divide evenly, a rank's last batches are filled with rows of ignored labels. So sums over tokens
    are exact, and ranks that communicate in the forward pass stay in step.
    """

    rows: Dataset
    batch_size: int
    _: KW_ONLY
    replicas: int = 1
    rank: int = 0

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.batch_size * self.replicas))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        batches = [self.indices(batch) for batch in range(len(self))]
        return _loader(_Filled(self.rows), batches, workers=0)

    def indices(self, batch: int) -> list[int]:
        """Return the numbers of the rows in a batch of this rank. Numbers past the last row are rows that fill up.

        Example: of 10 rows in batches of 4 on 2 ranks, rank 1 has 4 to 7, and rank 0 in its second batch 8 to 11.
        """
        start = (batch * self.replicas + self.rank) * self.batch_size
        return list(range(start, start + self.batch_size))


class _Filled(Dataset):
    """The rows, and past the last one rows with nothing to learn."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> Row:
        if index < len(self.rows):  # type: ignore[arg-type]
            return self.rows[index]
        row = self.rows[0]
        return row | {"labels": torch.full_like(row["labels"], IGNORE)}


def _loader(rows: Dataset, batches: object, workers: int) -> Iterator[Batch]:
    return (sent.batch for sent in start_loader(rows, workers, batch_sampler=batches, collate_fn=_collate))


def _collate(rows: list[Row]) -> SentBatch:
    return SentBatch(default_collate(rows))
