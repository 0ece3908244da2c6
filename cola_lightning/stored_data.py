"""Check plain data that was read from a file against the type in which it was written.

A checkpoint, cache, note or manifest may be of another program, cut short, or altered. Each reader declares the data
that it uses as a ``TypedDict``, and checks the data here before it uses a value. A problem is then one line with the
file, the key and the remedy, and not an error deep in a library.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le
from typing_extensions import TypedDict

from cola_lightning.errors import InputError

Count = Annotated[int, Ge(0), Le(2**62)]
"""A whole number of at least 0 that fits into 64 bits."""

Scalar = bool | int | float | str | None

ALTERED = "it was altered; take another checkpoint, or begin a new run with its weights by --weights_only_start true"
"""Remedy for a checkpoint."""


class StoredDataError(InputError):
    """Data that was read from a file has another type than it was written in."""


def read_json(file: Path, remedy: str = "", kind: Any = None) -> dict[str, Any]:
    """Read the JSON object in a file.

    Args:
        file: The file.
        remedy: Remedy for the user, for the message.
        kind: Type that the object must have; see :func:`check_stored`. Any object if not given.

    Raises:
        InputError: If the file cannot be read, does not hold a JSON object, or holds one of another type.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}; {remedy}".rstrip("; ")) from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a JSON {type(content).__name__}, not an object; {remedy}".rstrip("; "))
    if kind is not None:
        check_stored(content, kind, file, remedy)
    return content


def check_stored(content: object, kind: Any, place: object, remedy: str) -> None:
    """Check that data has a type. Keys that the type does not name are allowed.

    Args:
        content: Nested dicts, lists, numbers and texts.
        kind: A ``TypedDict`` (of ``typing_extensions``), ``dict[str, int]``, or another type. Nothing is converted, so
            neither True nor "3" is a whole number.
        place: File, and place in the file, for the message.
        remedy: Remedy for the user, for the message.

    Raises:
        StoredDataError: For the first value that is missing or of another type.
    """
    from pydantic import ValidationError  # imported here, because it takes 0.2 seconds

    try:
        _adapter(kind).validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, found = _follow(content, first["loc"])
        if first["type"] == "missing":
            problem = f"holds no {key}"
        else:
            shown = repr(found)
            shown = shown if len(shown) <= 80 else f"{shown[:80]} …"
            wanted = str(first["msg"]).replace("Input should", "should", 1)
            problem = f"sets {key} to {shown}, which {wanted}" if key else f"holds {shown}, which {wanted}"
        raise StoredDataError(f"{place} {' '.join(problem.split())}; {remedy}".strip()) from None


def is_stored_as(content: object, kind: Any) -> bool:
    """Say whether data has a type, for readers that can do without the data."""
    try:
        check_stored(content, kind, "", "")
    except StoredDataError:
        return False
    return True


def shape_of(example: Any, total: bool = True) -> Any:
    """Make the type of an example: dicts with the same keys, and values of the same types.

    Example: ``shape_of({"step": 3, "best": None})`` is a TypedDict with ``step: Count`` and ``best: Any``.

    Args:
        example: Nested dicts, lists, numbers and texts. A whole number stands for a count, and None for any value.
        total: Whether every key is required.
    """
    if isinstance(example, Mapping):
        fields = {key: shape_of(value, total) for key, value in example.items()}
        return TypedDict("Stored", fields, total=total)  # type: ignore[operator]
    if isinstance(example, int) and not isinstance(example, bool):
        return Count
    if example is None or isinstance(example, bool | float | str | list):
        return Any if example is None else type(example)
    from pydantic import InstanceOf

    return InstanceOf[type(example)]  # type: ignore[misc]


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _follow(content: Any, steps: tuple[Any, ...]) -> tuple[str, Any]:
    """Follow the steps of an error of pydantic to a value.

    pydantic adds steps for the members of a union that it tried. They are no keys of the data, so this stops at them.

    Returns:
        The keys of the place, joined by dots, and the value.
    """
    names: list[str] = []
    for number, step in enumerate(steps):
        inside = isinstance(content, Mapping) and step in content
        if isinstance(content, list | tuple) and isinstance(step, int):
            inside = 0 <= step < len(content)
        if not inside:
            if isinstance(content, Mapping) and number == len(steps) - 1:
                names.append(str(step))  # the key that is missing
            break
        names.append(str(step))
        content = content[step]
    return ".".join(names), content
