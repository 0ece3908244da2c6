"""Rows of equal length out of tokenized documents: one document per row, or documents packed end to end.

A row is a dict of int64 tensors (T,): ``input_ids``, and ``labels``, which equal the ids except for -100 where nothing
is learnt. Labels are not shifted; the loss does that. With a document mask there are ``document_ids`` too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORE = -100
"""Label of a position that is not learnt."""

Row = dict[str, Tensor]
Batch = dict[str, Tensor]


@dataclass
class RowShape:
    """How documents become rows.

    Args:
        length: Tokens of a row (T).
        packed: Pack documents end to end and cut them every T ids. Otherwise, make one row of each document.
        pad_id: Id that fills rows up.
        mask_documents: Number the documents of a packed row, so that attention stays within a document.
    """

    length: int
    packed: bool
    pad_id: int
    mask_documents: bool = False


class Piece(NamedTuple):
    """A part of a document, int32 ids, and whether the document begins with it."""

    ids: np.ndarray
    begins: bool


class RowArrays:
    """The arrays of a batch of rows, filled row by row.

    Args:
        rows: Number of rows (B).
        shape: How documents become rows.

    Attributes:
        ids, labels, document_ids: Each (B, T) int64.
    """

    def __init__(self, rows: int, shape: RowShape) -> None:
        size = (rows, shape.length)
        self.shape = shape
        self.ids, self.labels = np.full(size, shape.pad_id, dtype=np.int64), np.full(size, IGNORE, dtype=np.int64)
        self.document_ids = np.zeros(size, dtype=np.int64)

    def pad(self, row: int, document: np.ndarray) -> int:
        """Write one document into a row: cut it at T ids with its end-of-document id kept last, or leave padding.

        This is the benchmark of GaLore, CoLA and related work; T5's tokenizer also ends a truncated text with the id.

        Args:
            row: Number of the row.
            document: Its ids, the end-of-document id last.

        Returns:
            Number of ids written.
        """
        # Example, T = 4: of [5, 6, 7, 8, 9, 1] the row is [5, 6, 7, 1], of [5, 1] it is [5, 1, pad, pad].
        kept = min(len(document), self.shape.length)
        self.ids[row, :kept] = document[:kept]
        self.ids[row, kept - 1] = document[-1]
        self.labels[row, :kept] = self.ids[row, :kept]
        return kept

    def pack(self, row: int, take: Callable[[int], Piece | None]) -> None:
        """Fill a row with pieces of documents, end to end.

        With a document mask, the first token of a document is not learnt, because no token before it can predict it.

        Args:
            row: Number of the row.
            take: Returns the next piece, of at most the given number of ids, or None after the last document. The rest
                of the row is then padding.
        """
        # Example, T = 6, with a document mask. Pieces: the rest [8, 1] of a document, the document [5, 1], and [6, 7]
        # of a longer one, which the next row continues. A document has no label at its first token, a rest has one:
        #     ids           8  1  5  1  6  7
        #     labels        8  1  -  1  -  7
        #     document_ids  0  0  1  1  2  2
        ids, labels, document_ids = self.ids[row], self.labels[row], self.document_ids[row]
        filled = number = 0
        while filled < len(ids) and (piece := take(len(ids) - filled)) is not None:
            end = filled + len(piece.ids)
            ids[filled:end] = labels[filled:end] = piece.ids
            document_ids[filled:end] = number
            if piece.begins and self.shape.mask_documents:
                labels[filled] = IGNORE
            filled, number = end, number + 1
        document_ids[filled:] = number  # padding is a document of its own, so that no token looks at it

    def tensors(self) -> Batch:
        """Return the batch, without a copy: ``input_ids``, ``labels`` and, with a document mask, ``document_ids``."""
        batch = {"input_ids": torch.from_numpy(self.ids), "labels": torch.from_numpy(self.labels)}
        return batch | {"document_ids": torch.from_numpy(self.document_ids)} if self.shape.mask_documents else batch


class Documents:
    """Token ids of many documents, end to end in one array, with the offset where each begins.

    Args:
        column: Arrow column of lists of int32 ids, one list per document. A memory-mapped column of one chunk stays on
            disk.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        pieces = [chunk.flatten().to_numpy() for chunk in column.chunks]
        self.ids: np.ndarray = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in column.chunks])
        self.offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def summary(self) -> str:
        """Say how many documents and tokens there are."""
        return f"{len(self):,} document{'s' * (len(self) != 1)}, {len(self.ids):,} tokens"


class Rows(Dataset):
    """Rows of documents that are all at hand, in their order. Of packed rows, only the last may have padding.

    Args:
        documents: The documents.
        shape: How they become rows.
    """

    def __init__(self, documents: Documents, shape: RowShape) -> None:
        self.documents, self.shape = documents, shape

    def __len__(self) -> int:
        return -(-len(self.documents.ids) // self.shape.length) if self.shape.packed else len(self.documents)

    def __getitem__(self, index: int) -> Row:
        arrays = RowArrays(1, self.shape)
        if self.shape.packed:
            arrays.pack(0, self._pieces_from(index * self.shape.length))
        else:
            arrays.pad(0, self.documents[index])
        return {name: tensor[0] for name, tensor in arrays.tensors().items()}

    def _pieces_from(self, position: int) -> Callable[[int], Piece | None]:
        """Read on from a position, counted in ids over all documents.

        Example: with documents of 3, 2 and 6 ids, row 1 of T = 4 begins at position 4, which is the second id of
        document 1. Its pieces are the last id of document 1, and three ids of document 2.
        """
        # side="right" skips empty documents, which begin and end at the same position.
        offsets = self.documents.offsets
        document = int(np.searchsorted(offsets, position, side="right")) - 1

        def take(most: int) -> Piece | None:
            nonlocal position, document
            if document >= len(self.documents):
                return None
            begin, end = position, min(position + most, int(offsets[document + 1]))
            begins = begin == offsets[document]
            position = end
            if end == offsets[document + 1]:
                document += 1
            return Piece(self.documents.ids[begin:end], begins)

        return take


def count_learnt(labels: Tensor) -> Tensor:
    """Count the labels (B, T) that are predicted, as an int64 scalar: no label predicts the first token of a row."""
    return (labels[:, 1:] != IGNORE).sum()


def add_step_tokens(micro_batches: list[Batch]) -> list[Batch]:
    """Add to each micro-batch of an optimizer step the number of tokens that this rank learns from in the whole step.

    The loss of a step is the sum over its tokens divided by their number, so the number must be known when the first
    micro-batch is trained on. It is counted here, where the batches are still in host memory.

    Args:
        micro_batches: All micro-batches of this rank in one optimizer step.

    Returns:
        The same, each with ``step_tokens`` (B,) int64, the number repeated for every row.
    """
    zero = torch.zeros((), dtype=torch.int64)
    tokens = sum((count_learnt(batch["labels"]) for batch in micro_batches), start=zero)
    return [batch | {"step_tokens": tokens.expand(len(batch["labels"]))} for batch in micro_batches]
