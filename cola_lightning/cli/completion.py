"""Describe the options to other tools: a JSON schema for editors, and completion scripts for shells.

Both come from jsonargparse, which lists every class that a ``class_path`` may name. Lightning types some arguments as
any ``torch.nn.Module``. No classes are listed for these, because listing all modules of torch takes minutes and fails
on the metaclasses among them.
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

from cola_lightning.private_apis.jsonargparse import replace_subclass_lists


def json_schema(parser: ArgumentParser) -> dict[str, Any]:
    """Return the JSON schema of a config: the parser's options, and ``config`` for the files that it builds on."""
    with _open_ended():
        schema = json.loads(parser.get_completion_script("jsonschema"))
    _make_partial(schema)
    schema["properties"]["config"] = {
        "description": "File or files that this one builds on, relative to it.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return schema


def _make_partial(schema: Any) -> None:
    """Require nothing, because a config may leave any setting to the one it builds on. Allow ``key+`` for a list."""
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
    """Return a completion script for ``bash``, ``zsh``, ``tcsh``, ``fish`` or ``powershell``."""
    with _open_ended(nested=False):
        return parser.get_completion_script(f"shtab-{shell}")


def _takes_maker_of(cls: type, candidate: Any) -> bool:
    """Whether an argument of ``candidate`` is a function that makes a ``cls``."""
    try:
        annotations = [parameter.annotation for parameter in signature(candidate).parameters.values()]
    except (TypeError, ValueError):  # some functions in C have no signature
        return False
    return any(get_origin(each) is Callable and get_args(each)[-1:] == (cls,) for each in annotations)


@contextmanager
def _open_ended(nested: bool = True) -> Iterator[None]:
    """Leave out classes whose list would be too long, while the context lasts.

    Args:
        nested: Whether to list classes that are made of others of their own kind, such as an optimizer of two
            optimizers. A schema refers to itself there. Shell options name each level, and would have no end.
    """

    def change(original: Callable) -> Callable:
        def bounded(cls: Any, *args: Any, **kwargs: Any) -> list[str]:
            if cls in (nn.Module, Tensor, object) or (isinstance(cls, type) and issubclass(cls, type)):
                return []
            paths = original(cls, *args, **kwargs)
            return paths if nested else [path for path in paths if not _takes_maker_of(cls, locate(path))]

        return bounded

    with replace_subclass_lists(change), redirect_stdout(sys.stderr):  # deepspeed prints when it is imported
        yield
