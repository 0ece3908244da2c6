"""Check and write result files: a path is checked before the work, strict JSON is written after it."""

import json
import math
import os
from pathlib import Path
from typing import Any

from cola_lightning.errors import InputError


def check_output_file(file: str | None, option: str = "--json") -> None:
    """Refuse a file that could not be written at the end of the work.

    Args:
        file: Its path; None for no file.
        option: What names it, for the message.

    Raises:
        InputError: If its folder does not exist or cannot be written to, or it is a folder itself.
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
    """Strict JSON, indented. It has no infinity and no NaN; null stands for them."""
    return json.dumps(_strict(content), indent=2, allow_nan=False)


def write_json(file: str | None, content: Any) -> None:
    """Write the content as strict JSON; nothing where no file is named."""
    if file is not None:
        Path(file).write_text(to_json(content) + "\n", encoding="utf-8")


def write_whole(file: Path, text: str) -> None:
    """Write a text file that appears when it is complete, so that an interruption leaves the old one or none.

    Raises:
        OSError: If it cannot be written.
    """
    scratch = file.with_suffix(".part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(file)


def _strict(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _strict(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_strict(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
