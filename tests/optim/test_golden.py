"""GaLore, Fira, APOLLO and Muon, given the gradients that their authors' code was given (tests/golden).

``test_sharded`` replays them on sharded matrices.
"""

from functools import partial

import pytest
import torch

from cola_lightning.optim import APOLLO, Fira, GaLore, Muon
from cola_lightning.optim.galore import leading_directions
from cola_lightning.optim.sharded import distribute_like
from tests.golden.replay import MATRICES, distance, golden


def replay(make, data, rates, place=lambda tensor: tensor, whole=lambda tensor: tensor):
    """Return the largest relative distance of any matrix from the official one after any step.

    ``place`` places a matrix or its gradient, for instance on a device mesh; ``whole`` is the inverse.
    """
    parameters = {name: torch.nn.Parameter(place(data[f"initial.{name}"].clone())) for name in MATRICES}
    optimizer = make(list(parameters.values()))
    worst = 0.0
    for step in range(len(data["gradients.wide"])):
        for name, parameter in parameters.items():
            parameter.grad = place(data[f"gradients.{name}"][step].clone())
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = float(rates[step])
        optimizer.step()
        for name, parameter in parameters.items():
            worst = max(worst, distance(whole(parameter.detach()), data[f"weights.{name}"][step]))
    return worst


def with_given_projectors(optimizer_class, data, **options):
    """Return the optimizer with the official projectors, because the signs of singular vectors are arbitrary."""
    by_size = {tuple(data[f"initial.{name}"].shape): data[f"projectors.{name}"] for name in MATRICES}

    class Given(optimizer_class):
        def projector(self, p, grad, group):
            official = by_size[tuple(p.shape)][self.state[p]["step"] // group["update_proj_gap"]]
            return distribute_like(official, grad)

    return lambda parameters: Given(parameters, rank=4, update_proj_gap=12, eps=1e-6, **options)


GIVEN = {"galore": (GaLore, {"scale": 0.25}), "fira": (Fira, {"scale": 0.25}), "apollo": (APOLLO, {"scale": 1.0})}
MUON = partial(Muon, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")


@pytest.mark.parametrize("name", GIVEN)
def test_45_steps_with_four_projectors_give_the_official_weights(name):
    data, (optimizer_class, options) = golden(name), GIVEN[name]
    assert replay(with_given_projectors(optimizer_class, data, **options), data, data["learning_rate"]) <= 1e-6


@pytest.mark.parametrize("name", ["galore", "fira"])
def test_the_decomposition_is_the_official_one_up_to_signs(name):
    """At each refresh, of the gradient with the shorter side first."""
    data = golden(name)
    for matrix in MATRICES:
        for refresh, official in enumerate(data[f"projectors.{matrix}"]):
            grad = data[f"gradients.{matrix}"][12 * refresh]
            ours = leading_directions(grad.T if grad.shape[0] >= grad.shape[1] else grad, rank=4)
            signs = (ours * official).sum(0).sign()
            assert distance(ours * signs, official) <= 1e-4


@pytest.mark.parametrize(("name", "bound"), [("moonlight", 2e-2), ("moonlight_float32_iteration", 1e-5)])
def test_muon_is_moonlights(name, bound, monkeypatch):
    """As shipped, the iteration runs in bfloat16 on both sides, which rounds; in float32 they agree."""
    if name == "moonlight_float32_iteration":
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # which torch's iteration begins with
    assert replay(MUON, golden("muon", name), rates=None) <= bound
