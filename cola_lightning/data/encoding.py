"""Tokenize documents in batches that are large enough for the tokenizer's threads and fit in memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, TypeVar

import numpy as np

ENCODE_BATCH_SIZE = 64  # documents; enough to keep a tokenizer's threads busy
ENCODE_BATCH_CHARACTERS = 2_000_000  # at most, unless one document alone has more

Key = TypeVar("Key")
Ids = TypeVar("Ids")


def encode_in_batches(
    documents: Iterable[tuple[Key, Sized]], encode: Callable[[list[Any]], Sequence[Ids]]
) -> Iterator[tuple[Key, Ids]]:
    """Yield the ids of each document, in order, with its key.

    Args:
        documents: Key and text, or key and ids, of each document.
        encode: Makes ids of several documents, as :meth:`Tokenizer.encode` and :meth:`TextCorpus.encode` do.
    """
    entries = iter(documents)
    while some := list(islice(entries, ENCODE_BATCH_SIZE)):
        while some:
            count = _fitting(some)
            now, some = some[:count], some[count:]
            keys, texts = zip(*now, strict=True)
            yield from zip(keys, encode(list(texts)), strict=True)


def _fitting(entries: list[tuple[Key, Sized]]) -> int:
    """Count the first entries that have ENCODE_BATCH_CHARACTERS together; at least 1."""
    totals = np.cumsum([len(document) for _, document in entries])
    return max(1, int(np.searchsorted(totals, ENCODE_BATCH_CHARACTERS, side="right")))
