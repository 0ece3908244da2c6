"""Check which package imports which, by the source, and what an import loads, in a new interpreter."""

import ast
import json
import subprocess
import sys
from functools import cache

import pytest

from tests.conftest import REPOSITORY, source_tree

PACKAGE = REPOSITORY / "cola_lightning"
HEAVY = ["torch", "lightning", "transformers", "datasets", "deepspeed"]


@cache
def imports(folder: str) -> list[tuple[str, str]]:
    """List each file in the folder with each module that it imports, also within functions."""
    found = []
    for file in sorted((PACKAGE / folder).rglob("*.py")):
        for node in ast.walk(source_tree(file)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file} imports relatively, which this test cannot follow"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            found += [(str(file.relative_to(PACKAGE)), name) for name in names]
    return found


def test_only_the_entry_point_imports_the_command_line():
    found = {file for file, name in imports(".") if name.startswith("cola_lightning.cli")}
    assert {file for file in found if not file.startswith("cli/")} == {"__main__.py"}


LAYERS = [
    {"private_apis"},
    {"models"},
    {"methods", "optim"},
    {"checkpoints"},
    {"distributed"},
    {"data"},
    {"training"},
    {"costs"},
    {"hub", "inference"},
    {"callbacks"},
    {"benchmark", "compare"},
    {"cli"},
]
"""Layers of packages, the lowest first. A package imports those of its own layer and of lower ones."""


def test_imports_run_one_way():
    layer = {package: number for number, packages in enumerate(LAYERS) for package in packages}
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set(layer)
    upward = [
        (file, name)
        for file, name in imports(".")
        if name.startswith("cola_lightning.") and "/" in file
        and layer.get(name.split(".")[1], 0) > layer[file.split("/")[0]]
    ]  # fmt: skip
    assert upward == []


def test_models_import_no_lightning():
    assert [each for each in imports("models") if each[1].split(".")[0] in ("lightning", "lightning_utilities")] == []


@pytest.mark.parametrize(
    ("statement", "loads"),
    [
        ("import cola_lightning", []),
        pytest.param("import cola_lightning.models", ["torch"], marks=pytest.mark.slow),
    ],
)
def test_an_import_loads_no_more_than_it_needs(statement, loads):
    code = f"{statement}, sys, json; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == loads


def test_the_package_offers_load_model_by_name():
    import cola_lightning
    from cola_lightning.checkpoints import load_model

    assert cola_lightning.load_model is load_model
    with pytest.raises(AttributeError, match="has no attribute 'load_modle'"):
        cola_lightning.load_modle  # noqa: B018
