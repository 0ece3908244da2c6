"""Import Lightning without what it brings along and few commands need.

``import lightning`` imports all of torchmetrics, with SciPy, Matplotlib and transformers, and torch's compiler with
SymPy: four of its five seconds. Here each of them is imported when it is first used. Nothing is left out: whatever is
asked of a placeholder is looked up in the real module.
"""

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
PLOT = "torchmetrics.utilities.plot"
QUICK = {"Metric": "torchmetrics.metric", "MetricCollection": "torchmetrics.collections"}
"""Classes of torchmetrics that Lightning needs, and their modules."""


def import_lightning() -> None:
    """Import Lightning, or do nothing if it, or one of the libraries in question, is imported already."""
    if {"lightning", "torchmetrics", COMPILER} & set(sys.modules):
        return
    import torch

    _defer_torchmetrics()
    disable = torch.compiler.disable
    placeholder = ModuleType(COMPILER)
    vars(placeholder)["OptimizedModule"] = _OptimizedModule
    sys.modules[COMPILER] = placeholder
    torch.compiler.disable = not_compiled  # type: ignore[assignment]
    try:
        importlib.import_module("lightning")
    finally:
        torch.compiler.disable = disable
        del sys.modules[COMPILER]  # so that whoever imports it from now on gets the real one


class _CompiledType(type):
    """Type of the stand-in for ``torch._dynamo.OptimizedModule``. No object is one before the compiler is imported."""

    def __instancecheck__(cls, instance: Any) -> bool:
        compiler = sys.modules.get(COMPILER)
        return compiler is not None and isinstance(instance, compiler.OptimizedModule)


class _OptimizedModule(metaclass=_CompiledType):
    """Stand-in for the class of compiled modules, with which Lightning only tests objects."""


def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``torch.compile`` call a function without tracing it.

    It does what ``torch.compiler.disable`` does, but that imports the compiler when it decorates a function.
    """
    disabled = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if COMPILER not in sys.modules:
            return function(*args, **kwargs)  # nothing is compiled
        if disabled is None:
            disabled = importlib.import_module("torch").compiler.disable(function)
        return disabled(*args, **kwargs)

    vars(call)["_torchdynamo_disable"] = True  # the mark by which the compiler knows such a function
    return call


def _defer_torchmetrics() -> None:
    """Put placeholders for torchmetrics, and for its module that needs Matplotlib, into ``sys.modules``."""
    from importlib.metadata import version  # here, because it imports thirty modules and --help needs none

    spec = find_spec("torchmetrics")
    assert spec is not None, "lightning requires torchmetrics"
    assert spec.loader is not None
    package, load = module_from_spec(spec), spec.loader.exec_module
    vars(package)["__version__"] = version("torchmetrics")
    vars(package)["_logger"] = logging.getLogger("torchmetrics")  # which its modules import from the package

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in QUICK:
            importlib.import_module("torchmetrics.utilities")  # first, because it and the next import each other
            return getattr(importlib.import_module(QUICK[name]), name)
        vars(package).pop("__getattr__", None)
        load(package)  # fills this very object, as an import would have done
        return getattr(package, name)

    vars(package)["__getattr__"] = find
    sys.modules["torchmetrics"] = package
    sys.modules[PLOT] = _plot_placeholder()


def _plot_placeholder() -> ModuleType:
    """Make a module whose functions import the real one when they are called, and whose types are any."""
    placeholder = ModuleType(PLOT)

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_TYPE"):
            return object

        def call(*args: Any, **kwargs: Any) -> Any:
            if sys.modules.get(PLOT) is placeholder:
                del sys.modules[PLOT]
            return getattr(importlib.import_module(PLOT), name)(*args, **kwargs)

        return call

    vars(placeholder)["__getattr__"] = find
    return placeholder
