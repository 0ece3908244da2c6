"""Open files on a disk, on the Hugging Face hub, at http addresses, and in s3:// or gs:// buckets."""

import io
import warnings
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from cola_lightning.errors import InputError, hide_secrets

CONNECT, ANSWER = 15.0, 30.0
"""Seconds after which a request fails if the server does not accept the connection, or sends nothing."""

PIECE = 4 << 20
"""Bytes of one request."""
TAIL = 1 << 16
"""Bytes of a request after the end of a range, where only the rest of a line is needed."""
CHUNK = 1 << 17
"""Bytes of one read from a local or buffered file."""

# Package that reads each protocol, and the extra of this project that installs it.
EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}


def is_local(name: str) -> bool:
    """Whether a file is on a disk of this machine, where a retry does not help."""
    return "://" not in name or name.startswith("file://")


def path_of(name: str) -> str:
    """Remove query and fragment from an address. A path on a disk is unchanged, because it may contain ? and #."""
    return name if is_local(name) else name.split("?")[0].split("#")[0]


def storage_options(name: str) -> dict[str, Any]:
    """Return the options of the file system of an address.

    For the hub they are those of ``datasets``, so that fsspec returns the same file system, with its list of files.
    """
    protocol = name.partition("://")[0]
    if protocol == "hf":
        from datasets import config

        return {"endpoint": config.HF_ENDPOINT, "token": None}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=CONNECT, sock_read=ANSWER)
        return {"client_kwargs": {"trust_env": True, "timeout": timeout}}
    return {}


def open_file(name: str, **options: Any) -> IO[bytes]:
    """Open a file for reading bytes.

    Args:
        name: Path or address.
        options: Options for fsspec's ``open``.

    Raises:
        InputError: If the package for this kind of address is not installed.
        OSError: If the file cannot be opened.
    """
    with_package(name)
    if name.startswith("hf://") and _hub:
        return _hub[0].open(name, "rb", **options)
    filesystem, path = url_to_fs(name, **storage_options(name))
    return filesystem.open(path, "rb", **options)


def ignores_ranges(error: ValueError) -> bool:
    """Whether fsspec raised this error because a server does not send parts of a file."""
    return "range requests" in str(error) or "Cannot seek streaming" in str(error)


class RemoteBytes(io.RawIOBase):
    """Bytes of a file on another machine, from a given byte on.

    Each request asks for ``PIECE`` bytes up to the end of the range, and for ``TAIL`` bytes after it. A server that
    ignores the HTTP header Range sends the file from its beginning. Then the bytes before the range are dropped, with a
    warning for each file.

    Args:
        name: Address.
        begin: First byte.
        end: First byte after the range; None for the end of the file.

    Raises:
        OSError: If the file cannot be opened or read.
    """

    def __init__(self, name: str, begin: int = 0, end: int | None = None) -> None:
        self.name, self.position, self.end = name, begin, end
        self._piece = memoryview(b"")
        self._file = open_file(name, cache_type="none")
        try:
            self._file.seek(begin)
        except ValueError as error:
            self._read_as_stream(error)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._piece:
            self._piece = memoryview(self._fetch())
        count = min(len(buffer), len(self._piece))
        buffer[:count], self._piece = self._piece[:count], self._piece[count:]
        return count

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    def _fetch(self) -> bytes:
        size = PIECE if self.end is None else max(TAIL, min(PIECE, self.end - self.position))
        try:
            piece = self._file.read(size)
        except ValueError as error:
            self._read_as_stream(error)
            piece = self._file.read(size)
        self.position += len(piece)
        return piece

    def _read_as_stream(self, error: ValueError) -> None:
        """Open the file again as one stream, and drop the bytes before the position."""
        if not ignores_ranges(error):
            raise error
        if self.name not in _without_ranges:
            _without_ranges.add(self.name)
            warnings.warn(
                hide_secrets(
                    f"the server of {self.name} sends no parts of a file (HTTP Range), so each part is read from the "
                    f"beginning of the file"
                ),
                stacklevel=2,
            )
        self._file.close()
        self._file = open_file(self.name, block_size=0)
        left = self.position
        while left and (dropped := self._file.read(min(left, CHUNK))):
            left -= len(dropped)


_without_ranges: set[str] = set()
_hub: list[Any] = []


def use_hub(filesystem: Any) -> None:
    """Read files on the hub through this file system from now on.

    It has the list of files, which a forked process would request again.
    """
    _hub[:] = [filesystem]


def with_package(name: str) -> None:
    """Check that the package for this kind of address is installed.

    Raises:
        InputError: If it is not; names the extra to install.
    """
    protocol = name.partition("://")[0] if "://" in name else "file"
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package, extra = EXTRAS.get(protocol, (None, None))
        fix = f"pip install 'cola-lightning[{extra}]'" if extra else f"install it: {error}"
        raise InputError(f"{name} needs the package {package or 'of ' + protocol}; {fix}") from error
    except ValueError as error:
        raise InputError(f"{name} cannot be read: {error}") from error
