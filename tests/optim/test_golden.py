"""GaLore, Fira, APOLLO and Muon, fed with the gradients that their authors' code was fed with (tests/golden)."""

from functools import partial

import pytest
import torch

from cola_lightning.optim import APOLLO, Fira, GaLore
from tests.golden.replay import MATRICES, distance, golden


def replay(make, data, rates):
    """The largest relative distance of any matrix from the official one after any step."""
    parameters = {name: torch.nn.Parameter(data[f"initial.{name}"].clone()) for name in MATRICES}
    optimizer = make(list(parameters.values()))
    worst = 0.0
    for step in range(len(data["gradients.wide"])):
        for name, parameter in parameters.items():
            parameter.grad = data[f"gradients.{name}"][step].clone()
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = float(rates[step])
        optimizer.step()
        for name, parameter in parameters.items():
            worst = max(worst, distance(parameter.detach(), data[f"weights.{name}"][step]))
    return worst


def with_given_projectors(optimizer_class, data, **options):
    """The optimizer with the official projectors, because the signs of singular vectors are arbitrary."""
    by_size = {tuple(data[f"initial.{name}"].shape): data[f"projectors.{name}"] for name in MATRICES}

    class Given(optimizer_class):
        def projector(self, p, grad, group):
            return by_size[tuple(p.shape)][self.state[p]["step"] // group["update_proj_gap"]]

    return lambda parameters: Given(parameters, rank=4, update_proj_gap=12, eps=1e-6, **options)


@pytest.mark.parametrize(
    ("name", "optimizer_class", "options"),
    [("galore", GaLore, {"scale": 0.25}), ("fira", Fira, {"scale": 0.25}), ("apollo", APOLLO, {"scale": 1.0})],
)
def test_45_steps_with_four_projectors_give_the_official_weights(name, optimizer_class, options):
    data = golden(name)
    assert replay(with_given_projectors(optimizer_class, data, **options), data, data["learning_rate"]) <= 1e-6


@pytest.mark.parametrize("name", ["galore", "fira"])
def test_the_decomposition_is_the_official_one_up_to_signs(name):
    """At each refresh, of the gradient with the shorter side first."""
    data = golden(name)
    optimizer = (GaLore if name == "galore" else Fira)([torch.nn.Parameter(torch.zeros(2, 2))], rank=4)
    for matrix in MATRICES:
        for refresh, official in enumerate(data[f"projectors.{matrix}"]):
            grad = data[f"gradients.{matrix}"][12 * refresh]
            grad = grad.T if grad.shape[0] >= grad.shape[1] else grad
            parameter = torch.nn.Parameter(torch.zeros(1))
            optimizer.state[parameter] = {"step": 0}
            ours = optimizer.projector(parameter, grad, optimizer.param_groups[0])
            signs = (ours * official).sum(0).sign()
            assert distance(ours * signs, official) <= 1e-4


@pytest.mark.parametrize(("name", "bound"), [("moonlight", 2e-2), ("moonlight_float32_iteration", 1e-5)])
def test_torchs_muon_is_moonlights(name, bound, monkeypatch):
    """As shipped, the iteration runs in bfloat16 on both sides, which rounds; in float32 they agree."""
    if name == "moonlight_float32_iteration":
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # which torch's iteration begins with
    muon = partial(torch.optim.Muon, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    assert replay(muon, golden("muon", name), rates=None) <= bound
