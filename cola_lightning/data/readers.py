"""Open files of text as people have them, and get the text out of a line or a cell; shared by all that read text.

What is damaged is refused with file and place. Reading goes on only where nothing is lost: half a surrogate pair
becomes U+FFFD, which is said, and a byte order mark is left out.
"""

import gzip
import io
import json
import lzma
import re
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import fsspec

from cola_lightning.data.remote import is_local, open_file, path_of
from cola_lightning.errors import InputError, hide_secrets

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
BOM = b"\xef\xbb\xbf"
LONGEST = 1 << 27
"""Bytes of a line at most: a megabyte of a compressed file may hold a gigabyte of zeros."""
_CHUNK = 1 << 17
_SURROGATES = re.compile("[\ud800-\udfff]")
_repaired: set[str] = set()


# -- files ------------------------------------------------------------------------------------------------------------


def read_lines(name: str) -> Iterator[bytes]:
    """Yield the lines of a file, compressed or not, without a byte order mark.

    Args:
        name: Path or address.

    Raises:
        InputError: If it is not compressed as its name says, or it is damaged on this machine's disk.
        OSError, EOFError, zlib.error: If another machine's file is cut short, which may pass.
    """
    with _explained(name), open_file(name) as file, _decompressed(file, name) as lines:
        first = True
        while line := lines.readline(LONGEST + 1):
            if len(line) > LONGEST:
                raise InputError(f"{hide_secrets(name)} has a line of more than {LONGEST:,} bytes; is it text?")
            yield line.removeprefix(BOM) if first else line
            first = False


def _decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    path = path_of(name)
    suffix = next((suffix for suffix in COMPRESSED if path.endswith(suffix)), None)
    if suffix is None:
        # fsspec's own lines cost a seek each, which a server that sends a file as one stream does not offer.
        return file if is_local(name) else io.BufferedReader(_Pieces(file), _CHUNK)
    if suffix == ".zst":
        return _open_zstd(file, name)
    return fsspec.compression.compr[{".gz": "gzip", ".xz": "xz", ".bz2": "bz2"}[suffix]](file, mode="rb")


def _open_zstd(file: IO[bytes], name: str) -> IO[bytes]:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
        return zstd.ZstdFile(file)
    except ImportError:
        pass
    try:
        from zstandard import ZstdDecompressor
    except ImportError:
        raise InputError(
            f"{name} is compressed with zstd, which needs one more package; run: pip install 'cola-lightning[zstd]'"
        ) from None
    return io.BufferedReader(_ZstdFrames(file, ZstdDecompressor()), _CHUNK)


class _Pieces(io.RawIOBase):
    """Reads a file of fsspec from beginning to end."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.file.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


class _ZstdFrames(io.RawIOBase):
    """Reads all frames of a zstd file, one after another. ``zstandard``'s own reader ends after the first, and takes a
    file that is cut short for a whole one."""

    def __init__(self, file: IO[bytes], decompressor: Any) -> None:
        self.file, self.decompressor = file, decompressor
        self.frame: Any = None
        self.input = self.output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.output:
            self.input = self.input or self.file.read(_CHUNK)
            if not self.input:
                if self.frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            self.output = self.frame.decompress(self.input)
            self.input = b""
            if self.frame.eof:
                self.input, self.frame = self.frame.unused_data, None
        size = min(len(buffer), len(self.output))
        buffer[:size], self.output = self.output[:size], self.output[size:]
        return size


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Tell apart a file that will never be readable and a transfer that may succeed when it is tried again."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        foreign = isinstance(error, lzma.LZMAError) or type(error).__name__ in ("ZstdError", "IgzipError")
        damaged = foreign or isinstance(error, gzip.BadGzipFile | EOFError | zlib.error)
        if "Not a gzipped file" in str(error) or "Unknown frame descriptor" in str(error):
            raise InputError(
                f"{name} is not compressed as its name says ({error}); rename it, or fetch it again"
            ) from error
        if is_local(name) and (damaged or str(error) == "Invalid data stream"):
            raise InputError(f"{name} is cut short or damaged ({error}); fetch it again") from error
        if foreign:  # not an error that a retry knows
            raise OSError(f"{type(error).__name__}: {error}") from error
        raise


# -- text -------------------------------------------------------------------------------------------------------------


def json_text(line: bytes, column: str, place: str) -> str | None:
    """Get the text of one line of JSON; None where it is null.

    Args:
        line: The line, UTF-8.
        column: Key of the text.
        place: File and line, for messages.

    Raises:
        InputError: If it is no JSON object in UTF-8 with text under that key.
    """
    try:
        row = _load_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is not UTF-8{_encoding(line)}") from error
    except json.JSONDecodeError as error:
        if encoding := _encoding(line, ""):
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


def checked_text(value: Any, place: str, column: str) -> str | None:
    """Return the text with each half of a surrogate pair, which no tokenizer takes, as U+FFFD; None for null."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(f"{place} holds {type(value).__name__} under {column!r}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        file = place.rpartition(" line ")[0] or place
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
