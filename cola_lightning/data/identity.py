"""Record what data a run began with, and find what changed when the run resumes from a checkpoint.

A position in the data is valid only for the data in which it was recorded. A checkpoint therefore keeps, as plain
numbers and text, the settings that determine the order of the rows, the tokenizer's fingerprint, and for every source
the names, sizes and contents of its files, or the commit on the Hugging Face hub. A change that a position depends on
is an error of one line. A harmless change is reported, and the run continues.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from cola_lightning.data.fingerprints import commit_of, without_commit
from cola_lightning.data.remote import is_local, path_of
from cola_lightning.errors import InputError
from cola_lightning.stored_data import Count, Scalar

Identity = dict[str, Any]


class StoredTokenizer(TypedDict):
    """Tokenizer in an identity."""

    name: str | None
    fingerprint: str


class StoredSource(TypedDict):
    """Source in an identity; see :func:`describe_files`."""

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
    """Identity of a run's data in a checkpoint; see :func:`compare_runs`."""

    fixed: dict[str, Scalar]
    free: dict[str, Scalar]
    tokenizer: StoredTokenizer
    sources: NotRequired[list[StoredSource]]
    validation: NotRequired[StoredSource | None]
    ids: NotRequired[str | None]
    failed: NotRequired[bool]


# -- sources ----------------------------------------------------------------------------------------------------------


def describe_files(title: str, column: str, names: Sequence[str], fingerprints: Sequence[str]) -> Identity:
    """Summarize the files of a source, whatever their number, in a few plain values.

    Args:
        title: Name of the source in messages.
        column: Column of the text.
        names: Paths or addresses of the files, in order.
        fingerprints: Fingerprint of each file, from :func:`fingerprint_files`.

    Returns:
        The values that :class:`StoredSource` lists. A value is None if it is not known or does not apply.
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
        "paths": _digest(map(without_commit, names)) if on_hub else None,
        "bytes": sum(map(int, sizes)) if all(sizes) else None,
        "sizes": _digest(sizes) if all(sizes) else None,
        "contents": None if commit or not all(contents) else _digest(contents),
        "prepared": None,
    }


def content_of(source: Identity) -> list[str | None]:
    """Select the values of a source that must be the same on all ranks.

    The tags of a server are left out, because several hosts may answer.
    """
    keys = ("names", "paths", "commit", "sizes", "prepared")
    return [source[key] for key in keys] + [None if source["place"] == "a server" else source["contents"]]


def _digest(parts: Any) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def compare_sources(then: Identity, now: Identity, replaced: bool = False) -> tuple[str | None, str | None]:
    """Compare a source with what it was when the run began.

    Args:
        then: The source as the checkpoint describes it.
        now: The source as it is.
        replaced: Whether damaged files were expected to be replaced.

    Returns:
        The first difference with which the run must not continue, and a harmless difference; None for no difference.
    """
    title = now["title"]
    # From the most general difference to the most special: if the number of files differs, so do their names and sizes,
    # and the first is what a user has to know. A value that only one of the two has (None) is not compared.
    differ = {key for key in then if None not in (then[key], now.get(key)) and then[key] != now[key]}
    if "place" in differ:
        differ.discard("contents")  # one is a hash of bytes, the other the tag of a server
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
        return f"{title} was prepared again, and holds other ids", None
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
    """Compare the data of a run with the data that it began with.

    Args:
        then: Identity from the checkpoint. ``fixed`` and ``free`` are settings by flag. ``tokenizer`` is the
            tokenizer's name and fingerprint. ``sources`` and ``validation`` come from :func:`describe_files`;
            ``validation`` is None if it is no source of its own. ``ids`` is a digest of the training ids, if all of
            them are on disk. ``failed`` tells that the run ended because files could not be read; such files are
            expected to be replaced.
        now: Identity in this process. A key that only one of the two has is not compared.
        training: Whether the run continues to train. If it is only evaluated, the position in the data does not matter.

    Returns:
        Harmless changes, each as a text.

    Raises:
        InputError: If a change affects the position in the data, or the meaning of the ids.
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
        # A move of the validation text is not reported, because the training text that moved with it is.
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
