"""Get the text out of a JSON line, a Parquet cell or a plain text file, or say where and how it is damaged.

Damaged input is refused with its file and place. Two repairs lose nothing and are allowed: half of a surrogate pair
becomes U+FFFD, which is said once for each file, and a byte order mark is left out.
"""

import json
import re
import warnings
from typing import Any

from cola_lightning.data.lines import BOM, LinePlace
from cola_lightning.errors import InputError, hide_secrets

_SURROGATES = re.compile("[\ud800-\udfff]")
_repaired: set[str] = set()


def json_text(line: bytes, column: str, place: LinePlace) -> str | None:
    """Get the text of one line of JSON; None if it is null.

    Args:
        line: The line, UTF-8.
        column: Key of the text.
        place: File and line, for messages.

    Raises:
        InputError: If it is no JSON object in UTF-8 with text under that key.
    """
    # In UTF-16 with the low byte first, the second byte of a newline is the first of the next line. Its letters then
    # begin at an odd place of the line, and at an even one of the file.
    aligned = line[place.offset % 2 :]
    try:
        row = _load_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is not UTF-8{_encoding(aligned)}") from error
    except json.JSONDecodeError as error:
        if encoding := _encoding(aligned, ""):
            raise InputError(f"{place} is not UTF-8{encoding}") from error
        if b"\0" in line:
            raise InputError(
                f"{place} holds NUL bytes, as a file does whose writing was interrupted; write it anew, or delete that "
                f"line"
            ) from error
        reason = error.msg.removesuffix(" at")
        raise InputError(f"{place} is not JSON: {reason} at column {error.colno}") from error
    except RecursionError as error:
        raise InputError(f"{place} is nested too deep to be read; delete that line") from error
    if not isinstance(row, dict) or column not in row:
        found = f"its keys are {sorted(row)}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise InputError(f"{place} has no {column!r} ({found}); set text_column to the key of its text")
    return checked_text(row[column], place, column)


def _load_json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python refuses to make a number of more than 4,300 digits; only the text is wanted
        return json.loads(line, parse_int=float)


def cell_text(value: Any, place: str, column: str) -> str | None:
    """Get the text of an Arrow scalar, as :func:`json_text` does of a line."""
    try:
        return checked_text(value.as_py(), place, column)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place} holds under {column!r} what is not UTF-8: byte {error.object[error.start]:#04x} at offset "
            f"{error.start}; write the file anew from valid text"
        ) from error


def checked_text(value: Any, place: str | LinePlace, column: str) -> str | None:
    """Return the text with each half of a surrogate pair, which no tokenizer takes, as U+FFFD; None for null."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(f"{place} holds {type(value).__name__} under {column!r}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        file = str(place).rpartition(" line ")[0] or str(place)
        if file not in _repaired:
            _repaired.add(file)
            message = (
                f"{place} holds half of a surrogate pair ({value[error.start]!r}), which is no valid text; here and "
                f"further on in this file U+FFFD takes its place"
            )
            warnings.warn(hide_secrets(message), stacklevel=2)
        return _SURROGATES.sub("\ufffd", value)
    return value


def decode_text(content: bytes, name: str) -> str:
    """Decode a whole file of plain text, with or without a byte order mark.

    Raises:
        InputError: If it is not UTF-8, or holds NUL bytes.
    """
    try:
        text = content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        place = f": byte {error.object[error.start]:#04x} at offset {error.start}"
        fix = _encoding(content, "; convert it, for instance with: iconv -f latin1 -t utf-8")
        raise InputError(f"{name} is not UTF-8{place}{fix}") from error
    if "\0" in text:
        if encoding := _encoding(content, ""):
            raise InputError(f"{name} is not UTF-8{encoding}")
        raise InputError(
            f"{name} holds NUL bytes, the first at offset {content.index(0)}, and so is not plain text; remove them, "
            f"for instance with: tr -d '\\000'"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encoding(content: bytes, otherwise: str = "; convert the file to UTF-8") -> str:
    """Name UTF-16 and UTF-32, which a byte order mark or the NUL bytes of plain letters give away."""
    found = ""
    if content[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        found = "UTF-32"
    elif content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        found = "UTF-16"
    elif len(content) > 3:
        even, odd = (part.count(0) / len(part) for part in (content[:1000:2], content[1:1000:2]))
        # Half of each plain letter is a zero byte; a file of nothing but zeros is damaged, not UTF-16.
        found = "UTF-16LE" if odd > 0.5 > even else "UTF-16BE" if even > 0.5 > odd else ""
    return f", but {found}; convert it: iconv -f {found} -t UTF-8" if found else otherwise
