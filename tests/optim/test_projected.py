"""GaLore, Fira and APOLLO against their formulas, written out for each step."""

import io
import math

import pytest
import torch
from torch import nn

from cola_lightning.errors import InputError
from cola_lightning.optim import APOLLO, Fira, GaLore
from cola_lightning.optim.projected import limit_growth

LR, BETAS, EPS = 0.1, (0.9, 0.99), 1e-3
SHAPES = [(5, 7), (7, 5), (6, 6)]


def matrix(shape, dtype=torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))


def gradients(shape, steps, dtype=torch.float32) -> list:
    draw = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=draw).mul(1 + 3 * (step == 2)).to(dtype) for step in range(steps)]


def run(optimizer, p, grads) -> None:
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()


class Moments:
    """Adam's, in the order of the reference implementations: eps inside, bias correction outside."""

    def __init__(self):
        self.m = self.v = 0
        self.t = 0

    def __call__(self, r):
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * r
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * r**2
        step = LR * math.sqrt(1 - BETAS[1] ** self.t) / (1 - BETAS[0] ** self.t)
        return self.m / (self.v.sqrt() + EPS), step


def leading(grad, rank):
    """For the shorter side on the left."""
    return torch.linalg.svd(grad, full_matrices=False).U[:, :rank]


def oriented(p, grads):
    """Return the matrix and its gradients with the shorter side first. A square counts as tall, as theirs does."""
    turn = p.shape[0] >= p.shape[1]
    return (p.detach().clone().T if turn else p.detach().clone()), [g.T if turn else g for g in grads], turn


@pytest.mark.parametrize("shape", SHAPES)
def test_galore_follows_its_formula_and_keeps_its_moments_when_the_projector_changes(shape):
    p, grads = matrix(shape), gradients(shape, 5)
    w, gs, turn = oriented(p, grads)
    run(GaLore([p], LR, rank=3, scale=0.25, update_proj_gap=2, betas=BETAS, eps=EPS), p, grads)
    moments = Moments()
    for t, g in enumerate(gs):
        if t % 2 == 0:
            basis = leading(g, 3)
        n, step = moments(basis.T @ g)
        w -= step * 0.25 * basis @ n
    torch.testing.assert_close(p.detach(), w.T if turn else w)


@pytest.mark.parametrize("shape", SHAPES)
def test_galore_at_full_rank_is_adam_in_a_rotated_basis(shape):
    p, grads = matrix(shape), gradients(shape, 6)
    w, gs, turn = oriented(p, grads)
    run(GaLore([p], LR, rank=99, scale=1.0, update_proj_gap=1000, eps=1e-12), p, grads)
    basis = leading(gs[0], 99)
    rotated = nn.Parameter(basis.T @ w)
    run(torch.optim.Adam([rotated], LR, eps=1e-12), rotated, [basis.T @ g for g in gs])
    w = basis @ rotated.detach()
    torch.testing.assert_close(p.detach(), w.T if turn else w, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fira_follows_its_formula(shape, form):
    p, grads = matrix(shape), gradients(shape, 5)
    w, gs, turn = oriented(p, grads)
    optimizer = Fira([p], LR, rank=2, scale=0.25, update_proj_gap=2, growth=1.01, form=form, betas=BETAS, eps=EPS)
    run(optimizer, p, grads)
    moments, limited, last = Moments(), [], None
    for t, g in enumerate(gs):
        if t % 2 == 0:
            basis = leading(g, 2)
        r = basis.T @ g
        n, step = moments(r)
        s = (g - (0.25 if form == "code" else 1) * basis @ r) * (n.norm(dim=0) / (r.norm(dim=0) + 1e-8))
        limited.append(last is not None and bool(s.norm() > 1.01 * last))
        if limited[-1]:
            s *= 1.01 * (last + 1e-8) / s.norm()
        last = s.norm()
        w -= step * (0.25 * basis @ n + s if form == "code" else 0.25 * (basis @ n + s))
    assert any(limited)
    torch.testing.assert_close(p.detach(), w.T if turn else w)


def test_the_limiter_lets_a_norm_shrink_at_once_and_grow_by_its_factor():
    state, norms = {}, []
    for size in (2.0, 8.0, 1.0, 1.005, 1.1, 0.0, 3.0):
        x = torch.tensor([0.6 * size, 0.8 * size], dtype=torch.float64)
        norms.append(limit_growth(x, 1.01, state).norm().item())
    assert norms == pytest.approx([2, 2.02, 1, 1.005, 1.01505, 0, 0], abs=1e-6)


def test_fira_as_in_the_paper_has_nothing_outside_at_full_rank():
    fira, galore = matrix((5, 7)), matrix((5, 7))
    grads = gradients((5, 7), 4)
    run(optimizer := Fira([fira], LR, rank=5, form="paper"), fira, grads)
    run(GaLore([galore], LR, rank=5), galore, grads)
    assert optimizer.state[fira]["norm"] < 1e-5
    torch.testing.assert_close(fira, galore)


@pytest.mark.parametrize(("scaling", "scale"), [("channel", 1.0), ("tensor", 128.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_follows_its_formula(shape, scaling, scale):
    p, grads = matrix(shape), gradients(shape, 5)
    w, gs, turn = oriented(p, grads)
    optimizer = APOLLO([p], LR, 2, scale, scaling, update_proj_gap=2, growth=1.01, betas=BETAS, eps=EPS)
    moments, last = Moments(), None
    for grad, g in zip(grads, gs, strict=True):
        optimizer.state[p].setdefault("step", 0)
        image = optimizer.projector(p, g, optimizer.param_groups[0])
        run(optimizer, p, [grad])
        r = image.T @ g
        n, step = moments(r)
        dims = (0,) if scaling == "channel" else (0, 1)
        s = g * (n.norm(dim=dims) / (r.norm(dim=dims) + 1e-8))
        if last is not None and s.norm() > 1.01 * last:
            s *= 1.01 * (last + 1e-8) / s.norm()
        last = s.norm()
        w -= step * math.sqrt(scale) * s
    torch.testing.assert_close(p.detach(), w.T if turn else w)


def test_apollo_draws_another_image_for_each_matrix_and_round_with_variance_one_over_rank():
    ps = [matrix((400, 500)), matrix((400, 500))]
    optimizer = APOLLO(ps, rank=8, update_proj_gap=3)
    images = []
    for p in ps:
        for step in range(6):
            optimizer.state[p]["step"] = step
            images.append(optimizer.projector(p, p, optimizer.param_groups[0]))
    assert images[0].var().item() == pytest.approx(1 / 8, rel=0.1)
    assert [int(torch.equal(images[0], image)) for image in images] == [1, 1, 1] + [0] * 9
    assert "projector" not in optimizer.state[ps[0]]


MAKERS = {
    "galore": lambda ps: GaLore(ps, LR, rank=2, update_proj_gap=3),
    "fira": lambda ps: Fira(ps, LR, rank=2, update_proj_gap=3),
    "apollo": lambda ps: APOLLO(ps, LR, rank=2, update_proj_gap=3),
    "mini": lambda ps: APOLLO(ps, LR, 1, 128, "tensor", update_proj_gap=3),
}


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize(
    ("name", "numbers"),
    # For m x n, m <= n, and rank r the papers have m r + 2 n r for GaLore, one more for Fira's limiter, and 2 n r + 2
    # for APOLLO: the limiter and a seed, which here follows from the step. Beside them ours counts its steps.
    [("galore", 6 * 2 + 2 * 9 * 2), ("fira", 6 * 2 + 2 * 9 * 2 + 1), ("apollo", 2 * 9 * 2 + 1), ("mini", 2 * 9 + 1)],
)
def test_states_hold_as_many_numbers_as_the_papers_say(name, numbers, shape):
    p = matrix(shape)
    run(optimizer := MAKERS[name]([p]), p, gradients(shape, 4))
    assert sum(v.numel() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)) == numbers
    assert {key for key, v in optimizer.state[p].items() if not isinstance(v, torch.Tensor)} == {"step"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_goes_on_bit_for_bit_from_a_checkpoint_of_plain_data(name, dtype):
    """Saved between two refreshes, so that the projector has to come back with the rest."""
    grads = gradients((6, 9), 8, dtype)
    whole, broken = matrix((6, 9), dtype), matrix((6, 9), dtype)
    run(MAKERS[name]([whole]), whole, grads)
    run(first := MAKERS[name]([broken]), broken, grads[:5])
    file = io.BytesIO()
    torch.save({"p": broken.detach(), "optimizer": first.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = nn.Parameter(saved["p"])
    second = MAKERS[name]([again])
    second.load_state_dict(saved["optimizer"])
    run(second, again, grads[5:])
    assert torch.equal(again, whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaLore([matrix((3, 4))], rank=0), "GaLore: rank is 0; it must be at least 1"),
        (lambda: Fira([matrix((3, 4))], update_proj_gap=0), "Fira: update_proj_gap is 0"),
        (lambda: APOLLO([matrix((3,))]), r"APOLLO is for matrices, but was given a parameter of shape \(3,\)"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
