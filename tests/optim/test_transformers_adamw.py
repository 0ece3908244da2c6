"""Against closed forms, because no release of transformers that has it can be installed beside ours."""

import math

import pytest
import torch

from cola_lightning.optim import APOLLO, Fira, GaLore, TransformersAdamW


def travel(optimizer_class, gradient: float, steps: int) -> float:
    """How far an entry goes under a constant gradient, with a learning rate of one."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optimizer_class([p], lr=1.0, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
    for _ in range(steps):
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
    return -p.item()


@pytest.mark.parametrize("steps", [1, 50, 1000])
def test_eps_is_added_before_the_bias_correction(steps):
    """Under a constant g, M = g (1 - β₁ᵗ) and V = g² (1 - β₂ᵗ). torch's AdamW goes further where g is near eps."""
    g, eps = 1.8e-5, 1e-6
    roots = [math.sqrt(1 - 0.999**t) for t in range(1, steps + 1)]
    assert travel(TransformersAdamW, g, steps) == pytest.approx(sum(r * g / (r * g + eps) for r in roots), rel=1e-9)
    assert travel(torch.optim.AdamW, g, steps) == pytest.approx(steps * g / (g + eps), rel=1e-9)


@pytest.mark.parametrize("optimizer_class", [TransformersAdamW, GaLore, Fira, APOLLO])
def test_weights_decay_after_the_update(optimizer_class):
    """With decay, a step ends at what it gives without, times 1 - lr wd; torch's AdamW decays where the step begins."""
    torch.manual_seed(0)
    start, grad = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)

    def step(weight_decay):
        p = torch.nn.Parameter(start.clone())
        options = {} if optimizer_class is TransformersAdamW else {"rank": 2}
        p.grad = grad.clone()
        optimizer_class([p], lr=0.1, weight_decay=weight_decay, **options).step()
        return p.detach()

    torch.testing.assert_close(step(0.5), step(0.0) * (1 - 0.1 * 0.5), rtol=1e-12, atol=0)
