"""Fingerprints of files: short texts that differ if the files differ."""

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from cola_lightning.data.remote import is_local, storage_options
from cola_lightning.data.retry import Retry

READ_WHOLE = 64 << 20
"""Largest total size of the files, in bytes, up to which each is hashed as a whole, and not in samples."""
_SAMPLE, _SAMPLES = 4096, 16
_ON_HUB = re.compile(r"^hf://(?P<repository>.+?)@(?P<commit>[0-9a-f]{40})/")


def commit_of(name: str) -> str | None:
    """Return the commit in the address of a file on the Hugging Face hub; None for any other file."""
    found = _ON_HUB.match(name)
    return found["commit"] if found else None


def without_commit(name: str) -> str:
    """Return the path inside its repository of a file on the Hugging Face hub; other names as they are."""
    return _ON_HUB.sub("", name)


def _are_hashed_whole(names: Sequence[str]) -> bool:
    """Tell whether those of the files that are on a disk are small enough to be hashed as a whole, not in samples."""
    return sum(os.stat(_path(name)).st_size for name in names if is_local(name)) <= READ_WHOLE


def fingerprint_files(names: Sequence[str], retry: Retry) -> list[str]:
    """Compute a fingerprint of each file, ``SIZE:CONTENT``, which differs if the file differs.

    CONTENT is the commit of a file on the hub (SIZE is empty then), a hash of the bytes of a file on a disk, or the tag
    that another server keeps for a file. If the files on a disk have more than ``READ_WHOLE`` bytes together, samples
    of each are hashed: the ends, where compressed files and Parquet keep checksums and counts, and blocks in between.

    Args:
        names: Paths or addresses.
        retry: Retries requests to servers that fail.

    Raises:
        InputError: If a file is missing or cannot be read.
    """
    whole = _are_hashed_whole(names)

    def fingerprint(name: str) -> str:
        if commit := commit_of(name):
            return f":{commit}"
        if is_local(name):
            return _of_disk(_path(name), os.stat(_path(name)).st_mtime_ns, whole)
        return retry.call(lambda: _of_server(name), name)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(fingerprint, names))


def describe_content(names: Sequence[str], fingerprints: Sequence[str]) -> list[Any]:
    """Describe what files hold, for the name of a cache that is made from them.

    Small files on a disk are described by their names, which tell the format, and their hashes, so that a copy in any
    folder is the same text. Of large ones only samples are hashed, so their paths and times of change count too.

    Args:
        names: Paths or addresses.
        fingerprints: Fingerprint of each file, from :func:`fingerprint_files`.
    """
    if _are_hashed_whole(names):
        return [[Path(name).name if is_local(name) else name for name in names], fingerprints]
    times = [os.stat(_path(name)).st_mtime_ns if is_local(name) else 0 for name in names]
    return [names, fingerprints, times]


def _path(name: str) -> str:
    return name.removeprefix("file://")


@cache
def _of_disk(path: str, modified: int, whole: bool) -> str:
    size = os.path.getsize(path)
    found = hashlib.sha256()
    with open(path, "rb") as file:
        if whole or size <= _SAMPLE * (_SAMPLES + 1):
            found = hashlib.file_digest(file, "sha256")
        else:
            for sample in range(_SAMPLES + 1):
                file.seek((size - _SAMPLE) * sample // _SAMPLES)
                found.update(file.read(_SAMPLE))
    return f"{size}:{found.hexdigest()[:32]}"


def _of_server(name: str) -> str:
    filesystem, path = url_to_fs(name, **storage_options(name))
    facts = filesystem.info(path)
    tags = (facts.get(key) for key in ("ETag", "etag", "Content-MD5", "Last-Modified", "LastModified", "mtime"))
    tag = next((str(tag) for tag in tags if tag), "")
    size = facts.get("size")
    return f"{'' if size is None else size}:{tag}"
