"""Compare losses and gradient norms of twenty steps with tests/assets/curves.json."""

import json

import pytest

from tests.record_curves import (
    ALONE,
    ASSET,
    METHODS,
    STEPS,
    STRATEGIES,
    TOLERANCE,
    difference,
    is_portable,
    record_alone,
    record_strategies,
)

pytestmark = pytest.mark.slow

STORED = json.loads(ASSET.read_text())["curves"]
QUICK = ("method/cola", "method/cr_net_recompute", "method/galore", "method/switch_lora", "cola_m/latents")
ALONE_HERE = [name for name in ALONE if is_portable(f"{name}@64-true")]


def test_every_method_and_strategy_is_recorded():
    names = {name.rpartition("@")[0] for name in STORED}
    assert {*ALONE_HERE, *(f"strategy/{name}/none" for name in ("auto", "ddp", "fsdp2"))} <= names
    assert {f"method/{name}" for name in METHODS} - names == {"method/muon"}
    shorter = {name: len(curve["loss"]) for name, curve in STORED.items() if len(curve["loss"]) != STEPS}
    assert shorter == {"method/sst@64-true": 16}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALONE_HERE]
)
def test_losses_and_gradient_norms_are_those_recorded(name):
    key = f"{name}@64-true"
    assert difference(record_alone(name, "64-true"), STORED[key]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if not name.startswith("deepspeed")])
def test_strategies_give_the_curves_recorded(strategy):
    found = {f"{name}@64-true": curve for name, curve in record_strategies([strategy])}
    assert len(found) >= 5
    for name, curve in found.items():
        assert difference(curve, STORED[name]) <= TOLERANCE, name


@pytest.mark.parametrize("change", ["larger", "nan"])
def test_a_difference_in_one_step_is_found(change):
    curve = STORED["method/cola@64-true"]
    value = float.fromhex(curve["loss"][7])
    other = float("nan") if change == "nan" else value * (1 + 1e-8)
    changed = curve | {"loss": [*curve["loss"][:7], other.hex(), *curve["loss"][8:]]}
    assert difference(curve, curve) == 0
    assert not difference(changed, curve) <= TOLERANCE
