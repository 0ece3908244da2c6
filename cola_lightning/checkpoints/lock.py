"""Lock a directory, so that one run at a time uses it."""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

from cola_lightning.errors import InputError

NAME = ".lock"
_LOCKED: dict[Path, tuple[int, list[Path]]] = {}
"""Locked folders, each with the handle of its lock file and the folders that were made for it, the innermost first."""


def lock(folder: Path) -> None:
    """Lock a folder against other processes, until :func:`release` or the end of this process.

    The lock is a POSIX record lock. It ends with its process, even after SIGKILL. Worker processes do not inherit it,
    so a worker that outlives the run does not keep it. It works over NFS. If the system (Windows) or the file system
    has no such locks, or the folder cannot be written, nothing is locked.

    Raises:
        InputError: If another process has locked it.
    """
    folder = folder.absolute()
    if fcntl is None or folder in _LOCKED:
        return
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(handle, 200).decode(errors="replace").strip()
                os.close(handle)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return  # this file system has no locks
                raise InputError(
                    f"{folder} is in use by another run ({holder or 'unknown'}); wait for its end, stop it, or choose "
                    "another --run_dir"
                ) from None
            # A run removes its lock file at its end. If that happened after the file was opened here, the lock is on a
            # removed file: open the folder's new one.
            with suppress(FileNotFoundError):
                if os.stat(folder / NAME).st_ino == os.fstat(handle).st_ino:
                    break
            os.close(handle)
    except OSError:
        return
    _LOCKED[folder] = handle, made
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def release() -> None:
    """Release all locks of this process."""
    while _LOCKED:
        folder, (handle, made) = _LOCKED.popitem()
        with suppress(OSError):
            (folder / NAME).unlink()
        os.close(handle)
        with suppress(OSError):  # remove folders that are still empty, as after a refused run
            for each in made:
                each.rmdir()
