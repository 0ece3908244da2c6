"""Open files wherever they are: on a disk, on the Hugging Face hub, at http addresses, in s3:// or gs:// buckets."""

from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from cola_lightning.errors import InputError

CONNECT, ANSWER = 15.0, 30.0
"""Seconds until a server that does not take a connection, or sends nothing, counts as one that failed."""

# Package that reads a kind of address, and the extra of this project that installs it.
EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}


def is_local(name: str) -> bool:
    """Whether a file is on a disk of this machine, where a failed read does not get better by itself."""
    return "://" not in name or name.startswith("file://")


def path_of(name: str) -> str:
    """The address of a file without its query and fragment; a path on a disk as it is, because ? and # may stand in
    it."""
    return name if is_local(name) else name.split("?")[0].split("#")[0]


def storage_options(name: str) -> dict[str, Any]:
    """Options of the file system that an address belongs to. For the hub they are those of ``datasets``, so that the
    list of files which it asked for is known already."""
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
        options: How fsspec reads it.

    Raises:
        InputError: If the package for this kind of address is not installed.
        OSError: If the file cannot be opened.
    """
    with_package(name)
    if name.startswith("hf://") and _hub:
        return _hub[0].open(name, "rb", **options)
    filesystem, path = url_to_fs(name, **storage_options(name))
    return filesystem.open(path, "rb", **options)


_hub: list[Any] = []


def use_hub(filesystem: Any) -> None:
    """Read files on the hub through this file system from now on, because it knows their list; a process that was
    forked would ask for it again."""
    _hub[:] = [filesystem]


def with_package(name: str) -> None:
    """Check that the package for this kind of address is installed.

    Raises:
        InputError: If it is not; names the extra.
    """
    protocol = name.partition("://")[0] if "://" in name else "file"
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package, extra = EXTRAS.get(protocol, (None, None))
        fix = f"pip install 'cola-lightning[{extra}]'" if extra else f"install what it says: {error}"
        raise InputError(f"{name} needs the package {package or 'of ' + protocol}; {fix}") from error
    except ValueError as error:
        raise InputError(f"{name} cannot be read: {error}") from error
