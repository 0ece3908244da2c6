"""Token documents to rows of equal length: one document a row, as the paper has it, or packed end to end.

A row is a dict of two int64 tensors (T,): ``input_ids``, and ``labels`` that equal them but for -100 where nothing is
to be learnt. Labels are not shifted; the loss does that.
"""

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORE = -100

Row = dict[str, Tensor]


def count_learnt(labels: Tensor) -> Tensor:
    """Count the labels (B, T) that are predicted, as an int64 scalar: no label predicts the first token of a row."""
    return (labels[:, 1:] != IGNORE).sum()


def add_step_tokens(micro_batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Tell each micro-batch of an optimizer step how many tokens this rank learns from in the whole step.

    The loss of a step is a sum over its tokens divided by their number, so the number must be known when the first
    micro-batch is trained on. It is counted here, where the batches are still in the memory of the host.

    Args:
        micro_batches: All those of this rank in one optimizer step.

    Returns:
        The same, each with ``step_tokens`` (B,) int64, the number repeated for every row.
    """
    tokens = sum(count_learnt(batch["labels"]) for batch in micro_batches)
    return [batch | {"step_tokens": tokens.expand(len(batch["labels"]))} for batch in micro_batches]


class Documents:
    """Token ids of many documents, end to end in one array, with where each begins.

    Args:
        column: Arrow column of lists of int32 ids, one a document; a memory-mapped one in one piece stays on disk.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        pieces = [chunk.flatten().to_numpy() for chunk in column.chunks]
        self.ids: np.ndarray = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in column.chunks])
        self.offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def summary(self) -> str:
        """Say how many they are, and how many tokens they hold."""
        return f"{len(self):,} document{'s' * (len(self) != 1)}, {len(self.ids):,} tokens"


class PaddedRows(Dataset):
    """One document a row, cut at ``length`` with its end-of-document id kept last, and padded on the right.

    This is the benchmark of GaLore, CoLA and their kin: T5's tokenizer ends truncated rows with the id as well.
    """

    def __init__(self, documents: Documents, length: int, pad_id: int) -> None:
        self.documents, self.length, self.pad_id = documents, length, pad_id

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Row:
        return pad(torch.from_numpy(self.documents[index].astype(np.int64)), self.length, self.pad_id)


class PackedRows(Dataset):
    """Documents end to end, cut every ``length`` ids; only the last row is padded.

    With ``apart``, rows have ``document_ids`` (T,) too, the numbers of their documents, for attention that keeps to its
    own; then a document's first token is not to be learnt, for nothing before it may foretell it.
    """

    def __init__(self, documents: Documents, length: int, pad_id: int, mask_documents: bool = False) -> None:
        self.ids, self.offsets, self.length, self.pad_id = documents.ids, documents.offsets, length, pad_id
        self.mask_documents = mask_documents

    def __len__(self) -> int:
        return -(-len(self.ids) // self.length)

    def __getitem__(self, index: int) -> Row:
        begin = index * self.length
        row = _row(torch.from_numpy(self.ids[begin : begin + self.length].astype(np.int64)), self.length, self.pad_id)
        if self.mask_documents:
            numbers = np.searchsorted(self.offsets, np.arange(begin, begin + self.length), side="right")
            row["document_ids"] = torch.from_numpy(numbers - numbers[0])
            starts = self.offsets[(self.offsets >= begin) & (self.offsets < begin + self.length)]
            row["labels"][starts - begin] = IGNORE
        return row


def pad(ids: Tensor, length: int, pad_id: int) -> Row:
    """The row of one document, given its ids with the end-of-document id last."""
    if len(ids) > length:
        ids = torch.cat((ids[: length - 1], ids[-1:]))
    return _row(ids, length, pad_id)


def _row(ids: Tensor, length: int, pad_id: int) -> Row:
    input_ids = torch.full((length,), pad_id)
    labels = torch.full((length,), IGNORE)
    input_ids[: len(ids)] = ids
    labels[: len(ids)] = ids
    return {"input_ids": input_ids, "labels": labels}
