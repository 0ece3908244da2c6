"""Check that the installed libraries have the private APIs that this package uses."""

import functools
import importlib
import importlib.metadata
import inspect
import sys
from typing import Any

import torch

from cola_lightning.private_apis import deepspeed, jsonargparse, lightning, torchmetrics
from cola_lightning.private_apis import torch as torch_apis
from cola_lightning.private_apis.expected import Expected, PrivateAPIError
from cola_lightning.private_apis.torch import mark_operations, operation_marks

EXPECTED = lightning.EXPECTED + torch_apis.EXPECTED + torchmetrics.EXPECTED + jsonargparse.EXPECTED + deepspeed.EXPECTED


def check_private_apis(only_imported: bool = False) -> None:
    """Compare the installed libraries with what this package relies on.

    Args:
        only_imported: Look only at modules that are imported already, which takes a few milliseconds.

    Raises:
        PrivateAPIError: Names each API that is missing or changed, and the library's version.
    """
    problems = []
    for expected in EXPECTED:
        if only_imported and expected.path.partition(":")[0] not in sys.modules:
            continue
        version = _version(expected.library)
        if version and (problem := _problem(expected)):
            problems.append(f"{expected.library} {version}: {problem}")
    if not problems:
        with mark_operations({"probe": True}):
            if operation_marks().get("probe") is not True:
                problems.append(f"torch {torch.__version__}: torch.fx.traceback.annotate does not show in current_meta")
    if problems:
        raise PrivateAPIError(
            f"{'; '.join(problems)}. Install the versions that pyproject.toml allows, or mend {__package__}"
        )


@functools.cache
def _version(library: str) -> str | None:
    """Look up the installed version of a library, once, because each look-up parses a file; None without one."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _problem(expected: Expected) -> str | None:
    module, _, names = expected.path.partition(":")
    found: Any
    try:
        found = importlib.import_module(module)
        for name in names.split("."):
            found = inspect.getattr_static(found, name) if inspect.isclass(found) else getattr(found, name)
    except (ImportError, AttributeError):
        return f"{expected.path} is missing"
    if expected.parameters is not None:
        parameters = ", ".join(inspect.signature(found).parameters)
        if parameters != expected.parameters:
            return f"{expected.path} takes ({parameters}), not ({expected.parameters})"
    code = getattr(inspect.unwrap(found), "__code__", None) if expected.mentions else None
    absent = [word for word in expected.mentions if code is None or word not in _words(code)]
    return f"{expected.path} has no {' and no '.join(absent)}" if absent else None


def _words(code: Any) -> set[str]:
    """Return the names and texts in a function's code, also in functions within it."""
    words = {*code.co_names, *(text for text in code.co_consts if isinstance(text, str))}
    return words.union(*(_words(inner) for inner in code.co_consts if inspect.iscode(inner)))
