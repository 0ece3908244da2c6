"""Check that ``pytest -n 0 -m "not slow and not distributed"`` has tests of every package."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest

import cola_lightning

TESTS, PACKAGE = Path(__file__).parent, Path(cola_lightning.__file__).parent


def packages() -> set[str]:
    folders = [file.parent.relative_to(PACKAGE.parent) for file in PACKAGE.rglob("__init__.py")]
    return {".".join(folder.parts) for folder in folders}


def names(code: CodeType) -> Iterator[str]:
    """Yield the names that a function and the functions within it refer to."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names(constant)


def modules_used(function: Callable, seen: set[int]) -> Iterator[str]:
    """Yield the modules that a test refers to, also through other functions of the tests."""
    if id(function) in seen or not isinstance(function, FunctionType):
        return
    seen.add(id(function))
    for name in names(function.__code__):
        value = function.__globals__.get(name)
        value = value.func if isinstance(value, partial) else value
        module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
        yield module
        if module.startswith("tests."):
            yield from modules_used(value, seen)


def test_every_package_has_fast_tests(request):
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    if {item.path.parent for item in items} < {file.parent for file in TESTS.rglob("test_*.py")}:
        pytest.skip("only a part of the tests was asked for")
    fast = [item for item in items if not any(item.get_closest_marker(name) for name in ("slow", "distributed"))]
    used = {module for item in fast for module in modules_used(item.function, set())}
    missing = {package for package in packages() if not any(f"{module}.".startswith(f"{package}.") for module in used)}
    assert not missing, f"no fast test refers to anything in {', '.join(sorted(missing))}"
