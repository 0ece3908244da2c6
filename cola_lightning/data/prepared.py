"""Read tokenized shards from a disk: an index, and for each shard of the source its ids and the offsets of its rows.

    FOLDER/SPLIT/index.json          identity of the source, and for each shard its files with their checksums
    FOLDER/SPLIT/00000.ids.bin       ids of all documents, little-endian uint16, or int32 for larger vocabularies
    FOLDER/SPLIT/00000.offsets.npy   int64; row n is ids[offsets[n]:offsets[n + 1]], empty if the row has no text
    FOLDER/SPLIT/00000.rows.npy      int64; only for plain JSON Lines: the number of each document's row
    FOLDER/SPLIT/tokenizer/          the tokenizer

Rows keep their numbers, so that a run gives the same batches on a prepared source as on the source itself.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Len
from typing_extensions import TypedDict

from cola_lightning.data.identity import Identity, StoredSource
from cola_lightning.data.passes import WHOLE, Share
from cola_lightning.data.readers import is_parquet
from cola_lightning.data.sources import Source
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from cola_lightning.stored_data import Count, check_stored, read_json

FORMAT = 3
INDEX, PLAN, TOKENIZER = "index.json", "plan.json", "tokenizer"


class _File(TypedDict):
    bytes: Count
    sha256: str


class StoredShard(TypedDict):
    """Record of a shard."""

    source: str
    fingerprint: str
    record: str
    size: Count | None
    documents: Count
    tokens: Count
    files: Annotated[dict[str, _File], Len(2, 3)]


class _Index(TypedDict):
    identity: StoredSource
    tokenizer: str
    tokenizer_name: str | None
    dtype: Literal["<u2", "<i4"]
    documents: Count
    tokens: Count
    shards: list[StoredShard]


def is_prepared(source: Source) -> bool:
    """Whether the source is a folder that ``prepare`` made or began."""
    return (Path(source.path).expanduser() / source.split / PLAN).is_file()


class PreparedCorpus:
    """Shards of a prepared source, memory-mapped.

    Args:
        source: Source with the folder and the split.

    Raises:
        InputError: If ``prepare`` did not finish, or a file is missing or of the wrong size.
    """

    def __init__(self, source: Source) -> None:
        self.title = source.title
        self.folder = Path(source.path).expanduser() / source.split
        if not (self.folder / INDEX).is_file():
            raise InputError(f"{self.folder} was not prepared to the end; run the same 'prepare' again to finish it")
        remedy = "delete it, and run the same 'prepare' again"
        self.index = read_json(self.folder / INDEX, remedy)
        if self.index.get("format") != FORMAT:
            raise InputError(f"{self.folder} has format {self.index.get('format')}, not {FORMAT}; prepare it again")
        check_stored(self.index, _Index, self.folder / INDEX, remedy)
        self.shards: list[str] = [shard["source"] for shard in self.index["shards"]]
        for shard in self.index["shards"]:
            for name, facts in shard["files"].items():
                path = self.folder / name
                if not path.is_file() or path.stat().st_size != facts["bytes"]:
                    found = f"has {path.stat().st_size:,}" if path.is_file() else "is missing, not of"
                    raise InputError(
                        f"{path} {found} bytes, not {facts['bytes']:,}; delete "
                        f"{self.folder / shard['record']} and run the same 'prepare' again"
                    )

    def read(self, shard: int, start: int = 0, share: Share = WHOLE) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the rows of a share of a shard as :meth:`TextCorpus.read` does, each as its ids."""
        ids, offsets, *kept = self._open(shard)
        if kept:  # plain JSON Lines: a row's number is the byte at which it begins
            begin, end = share.bounds(self.index["shards"][shard]["size"] or 0)
            first, last = np.searchsorted(kept[0], (max(start, begin), end))
            for index in range(first, last):
                yield int(kept[0][index]), ids[offsets[index] : offsets[index + 1]]
            return
        rows = len(offsets) - 1
        if is_parquet(self.shards[shard]):
            begin, end = share.bounds(rows)
            numbers: Iterable[int] = range(max(start, begin), end)
        elif share.last - share.first == share.parts:
            numbers = range(start, rows)
        else:
            parts = np.arange(start, rows) % share.parts
            numbers = (start + np.flatnonzero((parts >= share.first) & (parts < share.last))).tolist()
        for number in numbers:
            document = ids[offsets[number] : offsets[number + 1]]
            if len(document):
                yield number, document

    def encode(self, documents: list[np.ndarray]) -> list[np.ndarray]:
        """Convert the ids of each document to int32."""
        return [ids.astype(np.int32) for ids in documents]

    @property
    def fingerprints(self) -> list[str]:
        """Checksums of the files of each shard."""
        return [" ".join(facts["sha256"] for facts in shard["files"].values()) for shard in self.index["shards"]]

    def identity(self) -> Identity:
        """Describe these shards, and the source that they were made from, in a few plain values."""
        prepared = hashlib.sha256("\n".join(self.fingerprints).encode()).hexdigest()[:32]
        return self.index["identity"] | {"title": self.title, "prepared": prepared}

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that made the ids."""
        return Tokenizer.load(str(self.folder / TOKENIZER))

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            InputError: For the first that differs; names it.
        """
        files = [(shard, name, facts) for shard in self.index["shards"] for name, facts in shard["files"].items()]

        with ThreadPoolExecutor() as pool:  # threads help because hashing releases the interpreter's lock
            sums = pool.map(lambda entry: sha256(self.folder / entry[1]), files)
            for (shard, name, facts), found in zip(files, sums, strict=True):
                if found != facts["sha256"]:
                    raise InputError(
                        f"{self.folder / name} is corrupted: its SHA-256 is {found[:12]}…, not "
                        f"{facts['sha256'][:12]}…; delete {self.folder / shard['record']} and run the same 'prepare' "
                        f"again"
                    )

    @cached_property
    def _open(self) -> Callable[[int], list[np.ndarray]]:
        """Return a function that maps a shard, and maps none twice."""
        return cache(self._map)

    def _map(self, shard: int) -> list[np.ndarray]:
        """Map the ids and offsets of a shard, and the numbers of its rows if it is plain JSON Lines."""
        ids, *arrays = (self.folder / name for name in self.index["shards"][shard]["files"])
        # As plain arrays, because a slice of a memmap takes some microseconds more.
        others = [np.load(file, mmap_mode="r").view(np.ndarray) for file in arrays]
        if not ids.stat().st_size:  # an empty file cannot be mapped
            return [np.empty(0, dtype=self.index["dtype"]), *others]
        return [np.memmap(ids, dtype=self.index["dtype"], mode="r").view(np.ndarray), *others]

    def __getstate__(self) -> dict[str, Any]:  # another process maps the files itself
        return {name: value for name, value in self.__dict__.items() if name != "_open"}


def sha256(path: Path) -> str:
    """Compute the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
