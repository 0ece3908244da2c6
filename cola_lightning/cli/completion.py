"""Help for those who type: a JSON schema for editors, and completion for shells.

Both come from jsonargparse, which describes every class that could stand at a ``class_path``. Lightning types some
arguments as any ``torch.nn.Module``; those few are left open here, for listing all modules of torch takes minutes and
fails on the metaclasses among them.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from inspect import signature
from pydoc import locate
from typing import Any, get_args, get_origin

from jsonargparse import ArgumentParser
from torch import Tensor, nn

from cola_lightning.private_apis import replace_subclass_lists


def json_schema(parser: ArgumentParser) -> dict[str, Any]:
    """The schema of a config: what the parser takes, and ``config`` for the files that it builds on."""
    with _open_ended():
        schema = json.loads(parser.get_completion_script("jsonschema"))
    _make_partial(schema)
    schema["properties"]["config"] = {
        "description": "File or files that this one builds on, relative to it.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return schema


def _make_partial(schema: Any) -> None:
    """Require nothing, for a file may leave anything to the one it builds on, and allow ``key+`` to extend a list."""
    if isinstance(schema, dict):
        schema.pop("required", None)
        for value in schema.values():
            _make_partial(value)
        properties = schema.get("properties", {})
        properties.update({f"{key}+": value for key, value in properties.items() if _takes_list(value)})
    elif isinstance(schema, list):
        for value in schema:
            _make_partial(value)


def _takes_list(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "array" or any(map(_takes_list, schema.get("anyOf", [])))


def shell_script(parser: ArgumentParser, shell: str) -> str:
    """A completion script for ``bash``, ``zsh``, ``tcsh``, ``fish`` or ``powershell``."""
    with _open_ended(nested=False):
        return parser.get_completion_script(f"shtab-{shell}")


def _takes_maker_of(cls: type, candidate: Any) -> bool:
    """Whether an argument of ``candidate`` is a function that makes a ``cls``."""
    try:
        annotations = [parameter.annotation for parameter in signature(candidate).parameters.values()]
    except (TypeError, ValueError):  # not everything that is written in C tells its arguments
        return False
    return any(get_origin(each) is Callable and get_args(each)[-1:] == (cls,) for each in annotations)


@contextmanager
def _open_ended(nested: bool = True) -> Iterator[None]:
    """``nested``: whether classes are listed that are made of others of their own kind, as an optimizer of two
    optimizers is. A schema refers to itself there; options, which name each level, would have no end."""

    def change(original: Callable) -> Callable:
        def bounded(cls: Any, *args: Any, **kwargs: Any) -> list[str]:
            if cls in (nn.Module, Tensor, object) or (isinstance(cls, type) and issubclass(cls, type)):
                return []
            paths = original(cls, *args, **kwargs)
            return paths if nested else [path for path in paths if not _takes_maker_of(cls, locate(path))]

        return bounded

    with replace_subclass_lists(change), redirect_stdout(sys.stderr):  # deepspeed talks when it is imported
        yield
