"""Keep documents that are held out for validation out of training, and copies of them."""

import hashlib
from collections.abc import Iterable
from pathlib import PurePosixPath

import numpy as np

ONE_IN = 20
"""One of this many documents may be held out, in a split that is both trained and validated on."""
PREFIX = 16  # ids


def may_be_held_out(shard: str, row: int) -> bool:
    """Whether a document of a split that is also trained on is a validation document, by a hash of the name of its file
    and its row. A document therefore stays on its side, whatever else the data set holds."""
    place = f"{PurePosixPath(shard.split('?')[0]).name}:{row}"
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest()) % ONE_IN == 0


class HeldOut:
    """Finds training documents that equal a validation document.

    Args:
        documents: Their ids, int32.
    """

    def __init__(self, documents: Iterable[np.ndarray]) -> None:
        self.digests: set[bytes] = set()
        # Most documents differ in their first ids, and comparing those is much cheaper than hashing all ids.
        self.prefixes: set[bytes] = set()
        for ids in documents:
            self.prefixes.add(ids[:PREFIX].tobytes())
            self.digests.add(_digest(ids))

    def may_have(self, ids: np.ndarray) -> bool:
        """Whether a document begins like one of them, given its first PREFIX ids or more."""
        return ids[:PREFIX].tobytes() in self.prefixes

    def has(self, ids: np.ndarray) -> bool:
        """Whether a document, given all its ids, equals one of them."""
        return self.may_have(ids) and _digest(ids) in self.digests


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
