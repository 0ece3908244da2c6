"""Get the text of a JSON line, a Parquet cell or a plain text file.

Damaged input is an error that names file and place. Two repairs lose no text and are made: half of a surrogate pair
becomes U+FFFD, with a warning for each file, and a byte order mark is left out.
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
        line: Line in UTF-8.
        column: Key of the text.
        place: File and line, for messages.

    Raises:
        InputError: If the line is not a JSON object in UTF-8 with text under that key.
    """
    # To recognize UTF-16, a line must begin with the first byte of a letter, which has an even offset in the file. In
    # little-endian UTF-16 a line begins at an odd offset, because the second byte of its newline comes first:
    # "a\nb" is 61 00 | 0A 00 | 62 00, and the second line is 00 62 00.
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
                f"{place} holds NUL bytes, probably because writing the file was interrupted; write the file again, or "
                f"delete that line"
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
    except ValueError:  # Python does not parse an int of more than 4,300 digits; only the text is needed here
        return json.loads(line, parse_int=float)


def cell_text(value: Any, place: str, column: str) -> str | None:
    """Get the text of an Arrow scalar; None if it is null.

    Raises:
        InputError: If it is not text in UTF-8.
    """
    try:
        return checked_text(value.as_py(), place, column)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place} holds under {column!r} what is not UTF-8: byte {error.object[error.start]:#04x} at offset "
            f"{error.start}; write the file again from valid text"
        ) from error


def checked_text(value: Any, place: str | LinePlace, column: str) -> str | None:
    """Return the text, with U+FFFD in place of each half of a surrogate pair; None for null.

    Tokenizers do not accept half of a surrogate pair.

    Raises:
        InputError: If the value is not text.
    """
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
                f"{place} holds half of a surrogate pair ({value[error.start]!r}), which is not valid text; U+FFFD "
                f"replaces it, here and in the rest of this file"
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
        fix = _encoding(content, "; convert it, for example with: iconv -f latin1 -t utf-8")
        raise InputError(f"{name} is not UTF-8{place}{fix}") from error
    if "\0" in text:
        if encoding := _encoding(content, ""):
            raise InputError(f"{name} is not UTF-8{encoding}")
        raise InputError(
            f"{name} holds NUL bytes, the first at offset {content.index(0)}, so it is not plain text; remove them, "
            f"for example with: tr -d '\\000'"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encoding(content: bytes, otherwise: str = "; convert the file to UTF-8") -> str:
    """Recognize UTF-16 and UTF-32 by a byte order mark or the NUL bytes of ASCII letters; return words for an error."""
    found = ""
    if content[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        found = "UTF-32"
    elif content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        found = "UTF-16"
    elif len(content) > 3:
        even, odd = (part.count(0) / len(part) for part in (content[:1000:2], content[1:1000:2]))
        # One of the two bytes of an ASCII letter is zero. If nearly all bytes are zero, the file is damaged.
        found = "UTF-16LE" if odd > 0.5 > even else "UTF-16BE" if even > 0.5 > odd else ""
    return f", but {found}; convert it: iconv -f {found} -t UTF-8" if found else otherwise
