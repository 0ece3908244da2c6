"""Record what data a run began with, and find what changed when the run goes on from a checkpoint.

A position in data means something only in the data that it was taken in. A checkpoint therefore keeps, as plain
numbers and text, the settings that the order of the rows depends on, the tokenizer's fingerprint, and for every source
the names, sizes and contents of its files, or the commit on the Hugging Face hub. A change is either refused, in one
line, or it is harmless; then the run takes it up and says so.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NotRequired

from fsspec.core import url_to_fs
from typing_extensions import TypedDict

from cola_lightning.data.remote import is_local, path_of, storage_options
from cola_lightning.data.retry import Retry
from cola_lightning.errors import InputError
from cola_lightning.stored_data import Count, Scalar

READ_WHOLE = 64 << 20
"""Bytes that files may hold together for each to be read whole; of larger ones, samples are taken."""
_SAMPLE, _SAMPLES = 4096, 16
_ON_HUB = re.compile(r"^hf://(?P<repository>.+?)@(?P<commit>[0-9a-f]{40})/")

Identity = dict[str, Any]


class StoredTokenizer(TypedDict):
    """A tokenizer in an identity."""

    name: str | None
    fingerprint: str


class StoredSource(TypedDict):
    """A source in an identity; see :func:`describe_files`."""

    title: str
    column: str
    place: str
    commit: str | None
    files: Count
    names: str
    paths: str | None
    bytes: Count | None
    sizes: str | None
    contents: str | None
    prepared: str | None
    revision: NotRequired[str | None]
    weight: NotRequired[float]


class StoredIdentity(TypedDict):
    """The identity of a run's data in a checkpoint; see :func:`compare_runs`."""

    fixed: dict[str, Scalar]
    free: dict[str, Scalar]
    tokenizer: StoredTokenizer
    sources: NotRequired[list[StoredSource]]
    validation: NotRequired[StoredSource | None]
    ids: NotRequired[str | None]
    failed: NotRequired[bool]


# -- files ------------------------------------------------------------------------------------------------------------


def commit_of(name: str) -> str | None:
    """The commit that the address of a file on the Hugging Face hub names; None for any other file."""
    found = _ON_HUB.match(name)
    return found["commit"] if found else None


def fingerprint_files(names: Sequence[str], retry: Retry) -> list[str]:
    """Make a short text for each file that differs if the file does, as ``SIZE:CONTENT``.

    The content is, of a file on the hub, its commit (without a size); of one on a disk, a hash of its bytes; of one on
    another server, the tag that the server keeps for it. Files on a disk that hold more than ``READ_WHOLE`` together
    are hashed in samples: the ends, where compressed files and Parquet keep checksums and counts, and blocks in
    between.

    Raises:
        InputError: If a file is missing or cannot be read.
    """
    sizes = [os.stat(_path(name)).st_size for name in names if is_local(name)]
    whole = sum(sizes) <= READ_WHOLE

    def fingerprint(name: str) -> str:
        if commit := commit_of(name):
            return f":{commit}"
        if is_local(name):
            return _of_disk(_path(name), os.stat(_path(name)).st_mtime_ns, whole)
        return retry.call(lambda: _of_server(name), name)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(fingerprint, names))


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


# -- sources ----------------------------------------------------------------------------------------------------------


def describe_files(title: str, column: str, names: Sequence[str], fingerprints: Sequence[str]) -> Identity:
    """Sum up the files of a source, whatever their number, in a few plain values.

    Args:
        title: What the source is called in messages.
        column: Column of its text.
        names: Its files, in order.
        fingerprints: As :func:`fingerprint_files` made them.
    """
    sizes, contents = zip(*(one.split(":", 1) for one in fingerprints), strict=True) if names else ((), ())
    commits = {commit_of(name) for name in names}
    on_hub = None not in commits
    commit = commits.pop() if on_hub and len(commits) == 1 else None
    place = "the hub" if on_hub else "this machine's disk" if all(map(is_local, names)) else "a server"
    return {
        "title": title,
        "column": column,
        "place": place,
        "commit": commit,
        "files": len(names),
        "names": _digest(Path(path_of(name)).name for name in names),
        "paths": _digest(_ON_HUB.sub("", name) for name in names) if on_hub else None,
        "bytes": sum(map(int, sizes)) if all(sizes) else None,
        "sizes": _digest(sizes) if all(sizes) else None,
        "contents": None if commit or not all(contents) else _digest(contents),
        "prepared": None,
    }


def content_of(source: Identity) -> list[str | None]:
    """Select what must be the same on all ranks. A server's tags are left out, because several hosts may answer."""
    keys = ("names", "paths", "commit", "sizes", "prepared")
    return [source[key] for key in keys] + [None if source["place"] == "a server" else source["contents"]]


def _digest(parts: Any) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def compare_sources(then: Identity, now: Identity, replaced: bool = False) -> tuple[str | None, str | None]:
    """Say what is wrong with a source, and what is to be said of it; None for nothing.

    Args:
        then: What it was.
        now: What it is.
        replaced: Whether files were expected to be replaced by whole ones.

    Returns:
        The first difference for which the run must not go on, and one that is harmless.
    """
    title = now["title"]
    differ = {key for key in then if None not in (then[key], now.get(key)) and then[key] != now[key]}
    if "place" in differ:
        differ.discard("contents")  # a hash of bytes there, a server's tag here
    if "commit" in differ and "title" in differ:
        return f"{title} is read in place of {then['title']}, and is another data set", None
    if "commit" in differ:
        return f"{title} is at commit {now['commit']}; it was at {then['commit']}: set its revision to that", None
    if "files" in differ:
        return f"{title} has {now['files']:,} files; it had {then['files']:,}", None
    if "names" in differ:
        return f"the files of {title} have other names, or another order", None
    if "paths" in differ:
        return f"{title} is read in place of {then['title']}, and is another part of the data set", None
    if "sizes" in differ or ("contents" in differ and now["place"] != "a server"):
        problem = f"the files of {title} have other contents"
        if "bytes" in differ:
            problem = f"the files of {title} hold {now['bytes']:,} bytes; they held {then['bytes']:,}"
        return (None, problem) if replaced else (problem, None)
    if "column" in differ:
        return f"text_column of {title} is {now['column']!r}; it was {then['column']!r}", None
    if "prepared" in differ:
        return f"{title} was prepared anew, and holds other ids", None
    if "weight" in differ:
        return f"the weight of {title} is {now['weight']}; it was {then['weight']}", None
    known = any(then[key] is not None and then[key] == now[key] for key in ("commit", "contents", "prepared"))
    if "place" in differ and not known:
        compared = "names and sizes" if then["sizes"] and now["sizes"] else "names"
        return None, (
            f"{title} is read from {now['place']}, in place of {then['title']} from {then['place']}; only {compared} "
            f"of their files could be compared"
        )
    if "contents" in differ:
        return None, f"the server keeps the files of {title} under other tags; their sizes are the same"
    if "title" in differ:
        return None, f"{title} is read in place of {then['title']}; its files are the same"
    return None, None


# -- runs -------------------------------------------------------------------------------------------------------------


def compare_runs(then: Identity, now: Identity, training: bool) -> list[str]:
    """Compare the data of a run with what it began with.

    Args:
        then: What the checkpoint holds: ``fixed`` and ``free`` settings by flag; ``tokenizer``, its name and
            fingerprint; ``sources``, and ``validation`` where it is a source of its own, as :func:`describe_files`
            makes them; ``ids``, a digest of the training ids where all of them are on disk; ``failed``, that the run
            ended because files could not be read, so that they are expected to be replaced.
        now: The same of this process. What one of the two does not hold is not compared.
        training: Whether the run goes on; else it is only evaluated, which no position matters to.

    Returns:
        Harmless changes, each in words.

    Raises:
        InputError: If anything changed that a position in the data, or the meaning of the ids, depends on.
    """
    wrong: list[str] = []
    said: list[str] = []
    for kind, changes in (("fixed", wrong), ("free", said)):
        for flag, value in now.get(kind, {}).items():
            if flag in then[kind] and then[kind][flag] != value:
                changes.append(f"--data.{flag} is {_value(value)}; it was {_value(then[kind][flag])}")
    if "sources" in now and "sources" in then:
        _compare_all_sources(then["sources"], now["sources"], then.get("failed", False), wrong, said)
    if now.get("validation") and then.get("validation"):
        # Where it moved to is of no interest; training text that moved with it says so.
        problem, note = compare_sources(then["validation"] | {"title": now["validation"]["title"]}, now["validation"])
        if found := problem or note:
            said.append(f"of the validation text, {found}; perplexities before and after may not be comparable")
    if not wrong and None not in (then.get("ids"), now.get("ids")) and then["ids"] != now["ids"]:
        wrong.append("the text gives other rows than it gave")
    if not training:
        wrong, said = [], wrong + said
    if "tokenizer" in now and now["tokenizer"]["fingerprint"] != then["tokenizer"]["fingerprint"]:
        names = [tokenizer["name"] or "trained on the text" for tokenizer in (now["tokenizer"], then["tokenizer"])]
        wrong.append(f"the tokenizer ({names[0]}) makes other ids than the one of the run ({names[1]})")
    if wrong:
        raise InputError(
            f"the data is not what the run began with: {'; '.join(wrong)}. Name the data and settings that it began "
            f"with, or begin a new run in another --run_dir"
        )
    return said


def _value(value: Any) -> str:
    return "null" if value is None else str(value)


def _compare_all_sources(
    then: list[Identity], now: list[Identity], replaced: bool, wrong: list[str], said: list[str]
) -> None:
    if len(then) != len(now):
        wrong.append(f"{len(now)} sources are named; there were {len(then)}")
        return
    pairs = [compare_sources(*pair, replaced) for pair in zip(then, now, strict=True)]
    titles = [[source["title"] for source in sources] for sources in (then, now)]
    if any(problem for problem, _ in pairs) and titles[0] != titles[1] and sorted(titles[0]) == sorted(titles[1]):
        wrong.append(f"the sources are named in another order; it was {', '.join(titles[0])}")
        return
    wrong += [problem for problem, _ in pairs if problem]
    said += [note for _, note in pairs if note]
