"""Resolve the data sets that a user names to shards that can be read from any row on."""

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
from fsspec.core import url_to_fs
from huggingface_hub.utils import get_session

from cola_lightning.data.fingerprints import commit_of, fingerprint_files
from cola_lightning.data.identity import Identity, describe_files
from cola_lightning.data.passes import WHOLE, Share
from cola_lightning.data.readers import Row, is_parquet, is_plain_lines, parquet_rows, read_file, read_table
from cola_lightning.data.remote import CONNECT, storage_options, use_hub, with_package
from cola_lightning.data.retry import Retry, failed_request
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError, hide_secrets

if TYPE_CHECKING:  # imported where it is used, because that takes a second
    from datasets import DatasetBuilder, IterableDataset

UNFINISHED = (".part", ".partial", ".incomplete", ".crdownload", ".tmp", ".bak", "~")
"""Endings of incomplete files and copies, which ``datasets`` reads as data."""

DataFiles = str | list[str] | dict[str, str | list[str]] | None


@dataclass
class Source:
    """A data set to train on.

    Args:
        path: Data set on the Hugging Face hub, a folder of files, one of the formats of ``datasets`` (``json``,
            ``parquet``, ``text`` …) with ``data_files``, or a folder that ``prepare`` made.
        name: Configuration of the data set, for example ``en``.
        revision: Branch, tag or commit on the hub.
        split: Split of the data set.
        data_files: Files, patterns or addresses, in place of those that the data set lists; by split, or for split
            ``train``.
        text_column: Column of the text.
        weight: Share of the training tokens if several sources are mixed.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    data_files: DataFiles = None
    text_column: str = "text"
    weight: float = 1.0

    @property
    def title(self) -> str:
        """Name of the source in logs and messages."""
        return hide_secrets("/".join(part for part in (self.path.rstrip("/"), self.name) if part))


def check_weights(sources: list[Source]) -> None:
    """Check that the weights of a mixture are shares, and that no source is named twice.

    Raises:
        InputError: Names the weights, if they are not.
    """
    weights = {source.title: source.weight for source in sources}
    if len(weights) < len(sources):
        raise InputError("two sources have the same path and name; each may be named once")
    if any(weight <= 0 for weight in weights.values()) or abs(sum(weights.values()) - 1) > 1e-6:
        raise InputError(
            f"the weights of the sources are {weights}, in sum {sum(weights.values()):g}; they are shares of the "
            f"tokens, each above 0, and must sum to 1"
        )


@dataclass
class Found:
    """Files of a data set, by split.

    Args:
        files: Paths or addresses of the files to read.
        filesystem: File system of the hub, which knows the list of files; None for other data sets.
        unfinished: Files that are left out because of their endings; see ``UNFINISHED``.
        repeated: Number of files that several patterns match; each is read once.
    """

    files: dict[str, list[str]]
    filesystem: Any = None
    unfinished: dict[str, list[str]] = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)


def find(source: Source, retry: Retry) -> Found:
    """Look up the files of a data set.

    On the hub this takes some requests. The result can be sent to other processes, which then need no requests, because
    the file system of the hub contains the list of files.

    Raises:
        InputError: If the data set, its revision or configuration does not exist.
    """
    # Messages name the addresses of the files, because the title is only their format then.
    addresses = _addresses(source)
    asked = addresses[0] + f" and {len(addresses) - 1} more" * (len(addresses) > 1) if addresses else source.title
    hub = None if addresses else huggingface_hub.constants.ENDPOINT
    builder = retry.call(lambda: _resolve(source), asked, server=hub)
    found = Found({})
    for split, some in (builder.config.data_files or {}).items():
        # Patterns may overlap; each file is read once.
        names = Counter(map(str, some))
        found.files[str(split)] = [name for name in names if not name.endswith(UNFINISHED)]
        found.unfinished[str(split)] = [name for name in names if name.endswith(UNFINISHED)]
        found.repeated[str(split)] = sum(names[name] > 1 for name in found.files[str(split)])
    if first := next((file for some in found.files.values() for file in some if file.startswith("hf://")), None):
        found.filesystem = url_to_fs(first, **storage_options(first))[0]
    return found


class TextCorpus:
    """Shards of a source that are read as text and tokenized.

    Args:
        source: Data set and split.
        tokenizer: Tokenizer for :meth:`encode`.
        retry: Retries reads that fail.
        found: Files of the data set, if they were looked up already.

    Raises:
        InputError: If the data set, its revision, configuration or split does not exist.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, retry: Retry, found: Found | None = None) -> None:
        self.title, self.column, self.split = source.title, source.text_column, source.split
        self.tokenizer, self.retry = tokenizer, retry
        self.source, found = source, found or find(source, retry)
        self._filesystem = found.filesystem
        if source.split not in found.files:
            raise InputError(f"{source.title} has no split {source.split!r}; it has {', '.join(found.files)}")
        self.shards: list[str] = found.files[source.split]
        if not self.shards:
            raise InputError(f"{source.title} split {source.split!r} has no file; check data_files {source.data_files}")

    @cached_property
    def fingerprints(self) -> list[str]:
        """Fingerprint of each shard; see :func:`fingerprint_files`."""
        return fingerprint_files(self.shards, self.retry)

    def identity(self) -> Identity:
        """Describe these shards in a few plain values; see :func:`describe_files`."""
        return describe_files(self.title, self.column, self.shards, self.fingerprints)

    def read(self, shard: int, start: int = 0, share: Share = WHOLE) -> Iterator[tuple[int, str]]:
        """Yield the number and the text of each row of a share of a shard; see :func:`read_file`.

        Rows without text are left out. After a read that failed, reading continues at the next row.

        Args:
            shard: Index in ``shards``.
            start: Smallest number of a row to yield.
            share: Part of the shard.

        Raises:
            InputError: If the shard is damaged or cannot be read after all retries; names shard and place.
        """
        name, size = self.shards[shard], self.size(shard)

        def read(start: int) -> Iterator[Row]:
            return self._rows(shard, start, share, size)

        for row, text in self.retry.iterate(read, name, start, "row" if size is None else "byte"):
            if text and text.strip():
                yield row, text

    def size(self, shard: int) -> int | None:
        """Look up the size, in bytes, of a shard that is divided by byte ranges; None for any other shard.

        The size comes from the run's identity, so that it is the same on all ranks and after resuming.

        Raises:
            InputError: As :meth:`read`.
        """
        name = self.shards[shard]
        if not is_plain_lines(name):
            return None
        if commit_of(name) and self._filesystem is not None:  # the list of files has the size
            return int(self.retry.call(lambda: self._filesystem.info(name)["size"], name))
        size = self.fingerprints[shard].partition(":")[0]
        return int(size) if size else None

    def rows(self, shard: int) -> int | None:
        """Look up the number of rows of a Parquet shard; None for any other, because counting takes a full read.

        Raises:
            InputError: As :meth:`read`.
        """
        name = self.shards[shard]
        return self.retry.call(lambda: parquet_rows(name), name) if is_parquet(name) else None

    def _rows(self, shard: int, start: int, share: Share, size: int | None) -> Iterator[Row]:
        name = self.shards[shard]
        if self._filesystem is not None:
            use_hub(self._filesystem)
        rows = read_file(name, self.column, start, share, size)
        if rows is not None:
            return rows
        table = self._stream.shard(num_shards=len(self.shards), index=shard)
        return read_table(table, name, self.column, start, share)

    @cached_property
    def _stream(self) -> "IterableDataset":
        """Stream of ``datasets``, for formats that :func:`read_file` does not read."""
        builder = self.retry.call(lambda: _resolve(self.source), self.title)
        stream = builder.as_streaming_dataset(split=self.split)
        if stream.num_shards != len(self.shards):
            raise InputError(
                f"{self.title} has {len(self.shards)} files but {stream.num_shards} shards, which cannot be told apart "
                f"by name; name its files as data_files"
            )
        return stream

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Encode each document as its ids, int32, ended by the end-of-document id."""
        return [np.array(ids, dtype=np.int32) for ids in self.tokenizer.encode(texts)]


def _resolve(source: Source) -> "DatasetBuilder":
    from datasets import DownloadConfig, load_dataset_builder
    from datasets.exceptions import DatasetsError

    for name in _addresses(source):
        with_package(name)
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            return load_dataset_builder(
                _expand_home(source.path),
                source.name,
                revision=source.revision,
                data_files=_expand_home(source.data_files),
                download_config=DownloadConfig(
                    storage_options={protocol: storage_options(f"{protocol}://") for protocol in ("http", "https")}
                ),
            )
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise InputError(
            f"data set {source.title} is a script, and no code of a data set is run; read its text from files: the hub "
            f"keeps those of many under --data.revision refs/convert/parquet"
        ) from error
    except ConnectionError as error:
        if _addresses(source):
            raise
        # The hub could not be reached, and datasets does not say why. Ask once more, so that the cause is known.
        try:
            get_session().head(huggingface_hub.constants.ENDPOINT, timeout=CONNECT)
        except Exception as cause:
            raise error from cause
        raise
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        # The same errors are raised for a server that is busy or silent.
        if "Unable to find 'http" in str(error) or failed_request(error) is not None:
            raise ConnectionError(str(error)) from error
        at = f" at revision {source.revision!r}" if source.revision else ""
        reason = str(error).splitlines()[0]
        if found := re.search(r"Available: (\[.*\])|available configs: (\[.*\])", str(error)):
            given = f"has no configuration {source.name!r}" if source.name else "has several configurations"
            reason = f"it {given}; name one of {found[1] or found[2]}" + " or null" * bool(source.name)
        raise InputError(f"data set {source.title}{at} cannot be opened: {reason}") from error


def _expand_home(paths: Any) -> Any:
    """Replace ``~`` in paths by the home folder, because ``datasets`` takes it for the name of a folder."""
    if isinstance(paths, dict):
        return {split: _expand_home(value) for split, value in paths.items()}
    if isinstance(paths, list | tuple):
        return [_expand_home(value) for value in paths]
    return str(Path(paths).expanduser()) if isinstance(paths, str) and paths.startswith("~") else paths


def _addresses(source: Source) -> list[str]:
    files = source.data_files.values() if isinstance(source.data_files, dict) else [source.data_files]
    names = [name for some in files for name in ([some] if isinstance(some, str) else some or [])]
    return [name for name in [source.path, *names] if "://" in name]
