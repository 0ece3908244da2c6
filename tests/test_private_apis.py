"""Check that one folder uses private APIs of libraries, and that it reports those that have changed."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
import time
from functools import cache
from pathlib import Path

import pytest

import cola_lightning
from cola_lightning import private_apis
from cola_lightning.private_apis import checks
from cola_lightning.private_apis.checks import EXPECTED, check_private_apis
from cola_lightning.private_apis.expected import PrivateAPIError
from tests.conftest import REPOSITORY, source_tree

PACKAGE = REPOSITORY / "cola_lightning"
OWN = {"private_apis", "light_import.py"}
"""The second comes before Lightning is imported. tests/test_light_import.py checks what it relies on."""
PRIVATE = re.compile(r"_[a-z]\w*")
DOCUMENTED = {"_asdict", "_exit", "_fields", "_replace"}
"""Names with an underscore that Python documents: ``os._exit``, and attributes of named tuples."""
TEXTS = {"_stderr", "_local", "_get_layout", "_functorch", "_aot_autograd", "_http"}
"""Parts of names in a pickle, of loggers and of lm-eval's results, which are compared but not looked up."""
LANGUAGE = {"_abc_impl", "_backward_cls"}
"""Attributes that Python's and torch's metaclasses set on every subclass."""


@cache
def trees() -> list[tuple[Path, ast.Module]]:
    files = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in OWN]
    assert len(files) > 100
    return [(file, source_tree(file)) for file in files]


def own_names(tree: ast.Module) -> set[str]:
    """List the names that a file defines: functions, classes, and attributes that their own methods set."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.arg):
            names.add(node.id if isinstance(node, ast.Name) else node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_uses(tree: ast.Module, own: set[str]) -> list[str]:
    """List uses of private names that this package does not define: by attribute, by text, by import."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            names = node.value.split(".")
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("cola_lightning"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        else:
            continue
        foreign = {name for name in names if PRIVATE.fullmatch(name)} - own - DOCUMENTED - TEXTS
        found += [f"line {node.lineno}: {name}" for name in sorted(foreign)]
    return found


def test_no_other_file_uses_a_private_api():
    files = trees()
    own = set().union(*(own_names(tree) for _, tree in files))
    found = {str(file.relative_to(PACKAGE)): uses for file, tree in files if (uses := private_uses(tree, own))}
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "trainer._signal_connector.register()",
        "getattr(strategy, '_ddp_kwargs', {})",
        "from torch._subclasses.fake_tensor import FakeTensorMode",
        "from jsonargparse import _util",
        "import torch._dynamo",
        "x = torch._foreach_add_(y, 1)",
    ],
)
def test_a_private_use_is_found(source):
    assert private_uses(ast.parse(source), own={"_own"})
    assert not private_uses(ast.parse("self._own = other._own; os._exit(1)"), own={"_own"})


def test_no_subclass_overrides_or_reads_a_private_attribute_of_its_base():
    """A subclass can override a private name of its base by accident."""
    found = {}
    for info in pkgutil.walk_packages(cola_lightning.__path__, "cola_lightning."):
        if info.name.endswith("__main__") or info.name.startswith(private_apis.__name__):
            continue
        module = importlib.import_module(info.name)
        written = {node.name for node in source_tree(Path(module.__file__)).body if isinstance(node, ast.ClassDef)}
        for name, cls in vars(module).items():  # libraries add classes to modules
            if name in written and cls.__module__ == info.name and (names := shared_names(cls)):
                found[f"{info.name}.{name}"] = names
    assert found == {}


def shared_names(cls: type) -> set[str]:
    """List private names that both a class of this package and a library's base class of it use."""
    above: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.startswith("cola_lightning") or base.__module__ in ("builtins", "abc", "typing", "enum"):
            continue
        for name, member in vars(base).items():
            above.add(name)
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if code := getattr(function, "__code__", None):
                above.update(code.co_names)
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))) if above else ast.Module([], [])
    # Read the source, because libraries add attributes to classes while a program runs.
    body = tree.body[0].body if tree.body else []
    own = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    own |= {node.id for part in body for node in ast.walk(part) if isinstance(node, ast.Name) and is_stored(part, node)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and (is_self(node.value) or ast.unparse(node.value) == "super()")
    }
    return {name for name in own & above if PRIVATE.fullmatch(name)} - LANGUAGE


def is_stored(part: ast.stmt, name: ast.Name) -> bool:
    """Whether a statement of the class itself, not of a method, binds the name."""
    return isinstance(part, ast.Assign | ast.AnnAssign) and isinstance(name.ctx, ast.Store)


# -- checks -----------------------------------------------------------------------------------------------------------


def test_the_installed_libraries_are_as_expected():
    check_private_apis()


def test_the_check_at_the_start_of_a_run_takes_a_moment():
    check_private_apis(only_imported=True)  # the first call compiles the patterns
    began = time.process_time()
    check_private_apis(only_imported=True)
    assert time.process_time() - began < 0.5


def owner_of(path: str) -> tuple[object, str]:
    module, _, names = path.partition(":")
    *owners, name = names.split(".")
    found = importlib.import_module(module)
    for each in owners:
        found = getattr(found, each)
    return found, name


@pytest.mark.parametrize("expected", EXPECTED, ids=lambda expected: expected.path)
def test_an_api_that_is_renamed_is_named_with_its_version(expected, monkeypatch):
    owner, name = owner_of(expected.path)
    version = importlib.metadata.version(expected.library)
    try:
        monkeypatch.delattr(owner, name)  # a base class may have another of the same name, which then differs
    except (AttributeError, TypeError):
        pytest.skip("it belongs to a class written in C")
    with pytest.raises(PrivateAPIError, match=f"{expected.library} {re.escape(version)}: {re.escape(expected.path)} "):
        check_private_apis()


def test_changed_arguments_are_named(monkeypatch):
    owner, name = owner_of("lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._should_check_val_fx")
    monkeypatch.setattr(owner, name, lambda self: True)
    with pytest.raises(PrivateAPIError, match=r"_should_check_val_fx takes \(self\), not \(self, data_fetcher\)"):
        check_private_apis(only_imported=True)


def test_an_attribute_that_is_set_no_more_is_named(monkeypatch):
    """Such a change would pass unnoticed: the attribute exists, because this package sets it."""
    owner, name = owner_of("lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop.advance")
    monkeypatch.setattr(owner, name, lambda self, data_fetcher: None)
    with pytest.raises(PrivateAPIError, match="advance has no _broadcast_sigterm_tensor"):
        check_private_apis(only_imported=True)


def test_marks_that_are_kept_elsewhere_are_named(monkeypatch):
    monkeypatch.setattr("torch.fx.traceback.current_meta", {})
    check_private_apis(only_imported=True)
    monkeypatch.setattr(checks, "operation_marks", dict)
    with pytest.raises(PrivateAPIError, match=r"torch \S+: torch.fx.traceback.annotate does not show"):
        check_private_apis(only_imported=True)


def test_a_run_on_another_version_ends_with_one_line(monkeypatch, capsys):
    from cola_lightning.cli.app import main

    owner, name = owner_of("lightning.pytorch.callbacks.model_checkpoint:ModelCheckpoint._find_last_checkpoints")
    monkeypatch.delattr(owner, name)
    with pytest.raises(SystemExit, match="1"):
        main(["fit", "--config=configs/none.yaml"])
    error = capsys.readouterr().err
    assert error.startswith("error: lightning ")
    assert "_find_last_checkpoints is missing" in error
    assert len(error.splitlines()) == 1


def test_every_library_of_the_file_has_an_upper_bound_or_a_check():
    """Lightning and jsonargparse change private APIs in minor versions; the bounds keep pip from taking one unseen."""
    text = (REPOSITORY / "pyproject.toml").read_text()
    for library in ("lightning", r"jsonargparse\[signatures\]"):
        assert re.search(rf'"{library}>=[\d.]+,<[\d.]+"', text), library
    assert {expected.library for expected in EXPECTED} <= {*sys.modules, "deepspeed"}
