"""Compare losses and gradient norms of twenty steps with tests/assets/curves.json.

``tests/distributed/test_strategies.py`` compares those of strategies.
"""

import json
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.record_curves import (
    ALONE,
    ASSET,
    METHODS,
    STEPS,
    TOLERANCE,
    difference,
    is_portable,
    record_alone,
)

pytestmark = pytest.mark.slow


MAY_MIX = {
    "torchmetrics:move",  # moves the states of metrics to the module's dtype, and back
    "module:optimizer_step",  # torch.optim.AdamW counts steps in float32
    "sst:_sample",  # its draws are float32 in every precision
    "reversible:to_float8",  # rounds to 8 bits, with one factor a row
    "reversible:from_float8",
}
"""Functions, as ``module:function``, in which a run in float64 may use narrower types too."""


class MixedTypes(TorchDispatchMode):
    """Note in which functions of the package an operation takes float64, and takes or gives a narrower type too.

    Numbers that were rounded to the narrower type differ between processors by as much.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken = float_types((args, kwargs))
        if torch.float64 in taken and len(taken | float_types(result)) > 1:
            self.found.add(caller())
        return result


def float_types(values: Any) -> set[torch.dtype]:
    tensors = (each for each in tree_leaves(values) if isinstance(each, torch.Tensor))
    return {each.dtype for each in tensors if each.is_floating_point()}


def caller() -> str:
    """Return the innermost function of the package that is being run, as ``module:function``."""
    frame = sys._getframe()
    while not frame.f_globals["__name__"].startswith("cola_lightning."):
        assert frame.f_back
        frame = frame.f_back
    return f"{frame.f_globals['__name__'].rpartition('.')[-1]}:{frame.f_code.co_name}"


STORED = json.loads(ASSET.read_text())["curves"]
ALONE_HERE = [name for name in ALONE if is_portable(f"{name}@64-true")]


def test_every_method_and_strategy_is_recorded():
    names = {name.rpartition("@")[0] for name in STORED}
    assert {*ALONE_HERE, *(f"strategy/{name}/none" for name in ("auto", "ddp", "fsdp2"))} <= names
    assert {f"method/{name}" for name in METHODS} - names == {"method/muon"}
    shorter = {name: len(curve["loss"]) for name, curve in STORED.items() if len(curve["loss"]) != STEPS}
    assert shorter == {"method/sst@64-true": 16}


@pytest.mark.parametrize("name", ALONE_HERE)
def test_losses_and_gradient_norms_are_those_recorded(name):
    key = f"{name}@64-true"
    with MixedTypes() as mixed:
        curve = record_alone(name, "64-true")
    assert mixed.found <= MAY_MIX
    assert difference(curve, STORED[key]) <= TOLERANCE


@pytest.mark.parametrize("change", ["larger", "nan"])
def test_a_difference_in_one_step_is_found(change):
    curve = STORED["method/cola@64-true"]
    value = float.fromhex(curve["loss"][7])
    other = float("nan") if change == "nan" else value * (1 + 1e-8)
    changed = curve | {"loss": [*curve["loss"][:7], other.hex(), *curve["loss"][8:]]}
    assert difference(curve, curve) == 0
    assert not difference(changed, curve) <= TOLERANCE
