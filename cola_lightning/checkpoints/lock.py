"""One run at a time in a directory."""

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from cola_lightning.errors import InputError

NAME = ".lock"
_HELD: dict[Path, tuple[int, list[Path]]] = {}
"""Each with its handle, and the folders that were made for the lock, the innermost first."""


def lock(folder: Path) -> None:
    """Keep other processes from running in a folder, until :func:`release` or the end of this process, however it ends.

    A POSIX record lock dies with its process, is not inherited by workers that outlive it, and holds over NFS. Where a
    file system has no locks, or the folder cannot be written, nothing is locked.

    Raises:
        InputError: If another process holds it.
    """
    folder = folder.absolute()
    if folder in _HELD:
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
                    return  # no locks here
                raise InputError(
                    f"{folder} is in use by another run ({holder or 'unknown'}); wait for its end, stop it, or choose "
                    "another --run_dir"
                ) from None
            # A run that ends removes the file: one that was opened before that is no longer the folder's.
            with suppress(FileNotFoundError):
                if os.stat(folder / NAME).st_ino == os.fstat(handle).st_ino:
                    break
            os.close(handle)
    except OSError:
        return
    _HELD[folder] = handle, made
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def release() -> None:
    """Let go of every folder that this process holds."""
    while _HELD:
        folder, (handle, made) = _HELD.popitem()
        with suppress(OSError):
            (folder / NAME).unlink()
        os.close(handle)
        with suppress(OSError):  # what a run that was refused leaves empty goes
            for each in made:
                each.rmdir()
