"""Check plain data that was read back from a file against the shape in which it was written.

A checkpoint, a cache, a note or a manifest may be of another program, cut, or altered. Whoever reads one states the
shape of what it uses as a ``TypedDict``, and checks it here before the first value is taken out; what is wrong is then
one line that names the file, the key and the remedy, and no error deep in a library.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any

from annotated_types import Ge, Le
from typing_extensions import TypedDict

from cola_lightning.errors import InputError

Count = Annotated[int, Ge(0), Le(2**62)]
"""A whole number that counts something, and fits into 64 bits."""
Scalar = bool | int | float | str | None


ALTERED = "it was altered; take another checkpoint, or begin a new run with its weights by --weights_only_start true"
"""What to do about a checkpoint."""


class StoredDataError(InputError):
    """Data that was read back has another shape than it was written in."""


def check_stored(content: object, kind: Any, place: object, remedy: str) -> None:
    """Check that data has the shape that a type states; keys that the type does not name may be there, too.

    Args:
        content: Nested dicts, lists, numbers and texts.
        kind: A type: a ``TypedDict`` (of ``typing_extensions``), ``dict[str, int]`` …; nothing is converted, so that
            neither True nor "3" is a whole number.
        place: File, and where in it, for the message.
        remedy: What the user can do, for the message.

    Raises:
        StoredDataError: For the first value that is missing or of another type.
    """
    from pydantic import ValidationError  # here, because it takes a fifth of a second

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
    """Tell whether data has the shape that a type states, for readers that can do without it."""
    try:
        check_stored(content, kind, "", "")
    except StoredDataError:
        return False
    return True


def shape_of(example: Any, total: bool = True) -> Any:
    """The type that states the shape of an example: the keys of its dicts, each with a value of the same type.

    Args:
        example: Nested dicts, lists, numbers and texts. Whole numbers in it are counts. Where it has None, anything may
            stand.
        total: Whether every key must be there.
    """
    if isinstance(example, Mapping):
        fields = {key: shape_of(value, total) for key, value in example.items()}
        return TypedDict("Stored", fields, total=total)  # type: ignore[operator]
    if isinstance(example, bool) or not isinstance(example, int):
        plain = isinstance(example, bool | float | str | list)
        return type(example) if plain else Any if example is None else _instance_of(type(example))
    return Count


def _instance_of(kind: type) -> Any:
    from pydantic import InstanceOf

    return InstanceOf[kind]  # type: ignore[misc, valid-type]


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _follow(content: Any, steps: tuple[Any, ...]) -> tuple[str, Any]:
    """The place that ``steps`` lead to, in words, and what stands there; pydantic adds steps for the types it tried."""
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
