"""Check the paths of result files before the work, and write the files after it."""

import json
import math
import os
from pathlib import Path
from threading import get_ident
from typing import Any

from cola_lightning.errors import InputError


def check_output_file(file: str | None, option: str = "--json") -> None:
    """Refuse a file that cannot be written, before the work.

    Args:
        file: Path of the file; None for no file.
        option: Option that names the file, for the message.

    Raises:
        InputError: If the path is a folder, its folder does not exist, or there is no permission to write.
    """
    if file is None:
        return
    path = Path(file)
    if path.is_dir():
        raise InputError(f"{option} {file} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{option} {file} cannot be written: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InputError(f"{option} {file} cannot be written: no permission; name another file")


def to_json(content: Any) -> str:
    """Format content as strict JSON, indented. Infinity and NaN become null, because JSON does not have them."""
    return json.dumps(_strict(content), indent=2, allow_nan=False)


def write_json(file: str | None, content: Any) -> None:
    """Write content as strict JSON; without a file, do nothing.

    Args:
        file: Path of the file. It may be a device, such as ``/dev/stdout``, so it is written in place and not renamed.
        content: Nested dicts, lists, numbers and texts.

    Raises:
        OSError: If the file cannot be written.
    """
    if file is not None:
        Path(file).write_text(to_json(content) + "\n", encoding="utf-8")


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file under another name and rename it, so that an interruption leaves the old file or none.

    The other name is this thread's own, because several may write the same file, or two that differ in their suffix.

    Folders that appear when complete are made by :func:`cola_lightning.data.cache.new_folder`. Checkpoints are written
    by :class:`cola_lightning.checkpoints.writer.CheckpointWriter`, and exported models by
    :func:`cola_lightning.hub.write_folder`.

    Raises:
        OSError: If the file cannot be written.
    """
    scratch = file.with_name(f".{file.name}.{os.getpid()}-{get_ident()}.part")
    try:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)  # a disk that is full leaves a part


def _strict(content: Any) -> Any:
    """Replace infinity and NaN by None in nested content."""
    if isinstance(content, dict):
        return {key: _strict(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_strict(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
