"""Read the lines in a byte range of a file, compressed or not, with the offset at which each line begins."""

import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import fsspec

from cola_lightning.data.remote import CHUNK, RemoteBytes, is_local, open_file, path_of
from cola_lightning.errors import InputError

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
BOM = b"\xef\xbb\xbf"
LONGEST = 1 << 27
"""Largest number of bytes of a line. One megabyte of a compressed file may unpack to a gigabyte of zeros."""


@dataclass
class LinePlace:
    """File and line that a message names. Few lines need a message, so the text is made only by ``str()``.

    Args:
        name: Path or address.
        number: Number of the line, from 1; None if it is not known, because reading began inside the file.
        offset: Byte at which the line begins, after decompression.
    """

    name: str
    number: int | None = None
    offset: int = 0

    def __str__(self) -> str:
        number = self.number
        if number is None and is_local(self.name):
            number = 1 + _count_newlines(self.name, self.offset)
        # Lines of a file on another machine are not counted, because that takes a read from its beginning.
        return f"{self.name} line {number}" if number else f"{self.name} line at byte {self.offset}"


def _count_newlines(name: str, end: int) -> int:
    count = 0
    with open_file(name) as file:
        while end > 0 and (piece := file.read(min(CHUNK, end))):
            count, end = count + piece.count(b"\n"), end - len(piece)
    return count


def read_lines(name: str, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that begin in a byte range of a file, each with the offset at which it begins.

    Adjacent ranges therefore have each line exactly once, at whatever byte they meet. Example: of three lines of 5
    bytes, the range 6..11 has only the third, because the second begins before it.

        byte           0    5    10
        line           aaaa bbbb cccc
        range 6..11          ^---^

    A byte order mark at the beginning of the file is left out. In a compressed file, offsets count decompressed bytes,
    and all bytes before the range are decompressed too.

    Args:
        name: Path or address.
        begin: First byte of the range.
        end: First byte after the range; None for the end of the file.

    Raises:
        InputError: If the file is not compressed as its name says, or is damaged on this machine's disk.
        OSError, EOFError, zlib.error: If a file on another machine is cut short; a retry may help.
    """
    with _explained(name), _open(name, begin, end) as (lines, position):
        while (end is None or position < end) and (line := lines.readline(LONGEST + 1)):
            if len(line) > LONGEST:
                raise InputError(f"{name} has a line of more than {LONGEST:,} bytes; is it text?")
            if position >= begin:
                yield position, line if position else line.removeprefix(BOM)
            position += len(line)


@contextmanager
def _open(name: str, begin: int, end: int | None) -> Iterator[tuple[IO[bytes], int]]:
    """Open a file for reading from ``begin`` on; yield it with the position at which it was opened."""
    compressed = path_of(name).endswith(COMPRESSED)
    # One byte early. If a line begins exactly at ``begin``, this byte is the newline before it, and readline() returns
    # only that; else readline() returns the rest of a line that began before the range.
    position = 0 if compressed else max(begin - 1, 0)
    if is_local(name):
        with open_file(name) as file:
            file.seek(position)
            yield _decompressed(file, name) if compressed else file, position
    else:
        raw = RemoteBytes(name, position, None if compressed else end)
        with io.BufferedReader(raw, CHUNK) as buffered:
            yield _decompressed(buffered, name) if compressed else buffered, position


def _decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    suffix = next(suffix for suffix in COMPRESSED if path_of(name).endswith(suffix))
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
    return io.BufferedReader(_ZstdFrames(file, ZstdDecompressor()), CHUNK)


class _ZstdFrames(io.RawIOBase):
    """Bytes of all frames of a zstd file.

    The reader of ``zstandard`` ends after the first frame, and does not notice that a file is cut short.
    """

    def __init__(self, file: IO[bytes], decompressor: Any) -> None:
        self.file, self.decompressor = file, decompressor
        self.frame: Any = None
        self.input = self.output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.output:
            self.input = self.input or self.file.read(CHUNK)
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
    """Raise InputError for a damaged file, and an error that is retried for a transfer that failed."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        foreign = isinstance(error, lzma.LZMAError) or type(error).__name__ in ("ZstdError", "IgzipError")
        damaged = foreign or isinstance(error, gzip.BadGzipFile | EOFError | zlib.error)
        if "Not a gzipped file" in str(error) or "Unknown frame descriptor" in str(error):
            raise InputError(
                f"{name} is not compressed as its name says ({error}); rename it, or download it again"
            ) from error
        if is_local(name) and (damaged or str(error) == "Invalid data stream"):
            raise InputError(f"{name} is cut short or damaged ({error}); download it again") from error
        if foreign:  # not one of TRANSIENT_ERRORS
            raise OSError(f"{type(error).__name__}: {error}") from error
        raise
