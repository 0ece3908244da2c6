"""Keep text that is held out for validation out of training, wherever a copy of it stands."""

import hashlib
from collections.abc import Iterable
from pathlib import PurePosixPath

import numpy as np

ONE_IN = 20
"""Of a split that is both trained and validated on, every so many documents may be held out."""
_PREFIX = 16  # ids


def may_be_held_out(shard: str, row: int) -> bool:
    """Whether a document of a split that is also trained on belongs to the validation documents, by a hash of the name
    of its file and its row. A document therefore stays on its side, whatever else the data set holds."""
    place = f"{PurePosixPath(shard.split('?')[0]).name}:{row}"
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest()) % ONE_IN == 0


class HeldOut:
    """The validation documents, to tell which training documents equal one of them.

    Args:
        documents: Their ids, int32.
    """

    def __init__(self, documents: Iterable[np.ndarray]) -> None:
        self.digests: set[bytes] = set()
        # Nearly all documents are told apart by their first ids, which is much cheaper than to hash all of them.
        self.prefixes: set[bytes] = set()
        for ids in documents:
            self.prefixes.add(ids[:_PREFIX].tobytes())
            self.digests.add(_digest(ids))

    def has(self, ids: np.ndarray) -> bool:
        return ids[:_PREFIX].tobytes() in self.prefixes and _digest(ids) in self.digests


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
