from types import SimpleNamespace

import pytest
import torch

from cola_lightning.errors import InputError
from cola_lightning.methods import SST, SSTCallback
from tests.methods.runs import train


def projection(sizes=(20, 30), rank=5):
    torch.manual_seed(0)
    return SST(*sizes, rank=rank)


@pytest.mark.parametrize("sizes", [(20, 30), (30, 20), (20, 20)])
def test_start_is_the_decomposition_of_an_ordinary_matrix(sizes):
    module = projection(sizes)
    torch.manual_seed(0)
    matrix = torch.empty(sizes[1], sizes[0]).normal_(std=0.02)
    torch.testing.assert_close(module.dense(), matrix, atol=1e-6, rtol=0)
    torch.testing.assert_close(module.sigma.data, torch.linalg.svdvals(matrix))


@pytest.mark.parametrize("decompose", [False, True])
def test_iterations_and_rounds_leave_the_matrix_as_it_was(decompose):
    module = projection()
    rounds = SSTCallback(iteration_steps=1, iterations_per_round=1 if decompose else 2, seed=0)
    rounds.projections, rounds.optimizer = [module], torch.optim.AdamW(module.parameters())
    with torch.no_grad():
        module.sigma.mul_(torch.rand(20) * 2)
        module.u.copy_(torch.nn.functional.normalize(torch.randn(5, 30), dim=-1))
    before, active = module.dense(), module.active.clone()
    with torch.no_grad():
        rounds.after_step(SimpleNamespace(), 1)
    torch.testing.assert_close(module.dense(), before, atol=1e-6, rtol=0)
    assert not torch.equal(module.active, active)
    assert not module.U[module.active].any()
    vectors = module.U.index_copy(0, module.active, module.u)
    orthogonal = torch.allclose(vectors @ vectors.T, torch.eye(20), atol=1e-5)
    assert orthogonal == decompose
    assert (module.sigma.diff() <= 0).all() == decompose


def test_gradients_are_those_of_the_formulas():
    """∂σ_i = u_iᵀ G v_i, ∂u_i = G v_i, ∂v_i = Gᵀ u_i, with G and the input's gradient by autograd on the dense form."""
    module, x, weight = projection(), torch.randn(2, 3, 20, requires_grad=True), torch.randn(2, 3, 30)
    dense = module.dense().detach().requires_grad_()
    (x @ dense.T * weight).sum().backward()
    G, grad_x, x.grad = dense.grad, x.grad, None  # noqa: N806
    y = module(x)
    torch.testing.assert_close(y, x @ dense.T)
    (y * weight).sum().backward()
    U = module.U.index_copy(0, module.active, module.u)  # noqa: N806
    V = module.V.index_copy(0, module.active, module.v)  # noqa: N806
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(x.grad, grad_x, **close)
    torch.testing.assert_close(module.sigma.grad, torch.einsum("io,on,in->i", U, G, V), **close)
    torch.testing.assert_close(module.u.grad, module.v @ G.T, **close)
    torch.testing.assert_close(module.v.grad, module.u @ G, **close)
    assert module.U.grad is None
    assert module.V.grad is None


def test_sampling_follows_the_probabilities():
    """The first of the indices, drawn one at a time, has p(i) = ½ (1/M + σ_i / Σσ); and all are different."""
    module = SST(4, 4, rank=1)
    with torch.no_grad():
        module.sigma.copy_(torch.tensor([6.0, 3.0, 1.0, 0.0]))
    draw = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[module._sample(torch.rand(4, generator=draw))] += 1
    expected = torch.tensor([0.425, 0.275, 0.175, 0.125])
    torch.testing.assert_close(counts / 4000, expected, atol=4 * (0.25 / 4000) ** 0.5, rtol=0)
    module = SST(20, 20, rank=20)
    assert module.active.tolist() == list(range(20))


def test_vectors_keep_unit_length_and_sigma_its_sign():
    rounds, module = SSTCallback(iteration_steps=3, seed=0), projection()
    rounds.projections, rounds.optimizer = [module], torch.optim.AdamW(module.parameters(), lr=0.05)
    trainer, below = SimpleNamespace(world_size=1), 0
    for step in range(1, 10):
        module(torch.randn(4, 20)).square().sum().backward()
        rounds.optimizer.step()
        assert (module.u.norm(dim=-1) - 1).abs().max() > 1e-3
        below += int((module.sigma < 0).sum())
        with torch.no_grad():
            rounds.after_step(trainer, step)
        assert module.sigma.min() >= 0
        for vectors in (module.u, module.v):
            torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(5), atol=1e-5, rtol=0)
    assert below > 0


def test_iterations_begin_with_fresh_optimizer_state():
    rounds = SSTCallback(iteration_steps=2, iterations_per_round=2, seed=0)
    module = projection()
    rounds.projections, rounds.optimizer = [module], torch.optim.AdamW(module.parameters())
    trainer, known = SimpleNamespace(world_size=1), {}
    for step in range(1, 5):
        module(torch.randn(4, 20)).square().sum().backward()
        rounds.optimizer.step()
        with torch.no_grad():
            rounds.after_step(trainer, step)
        states = {name: rounds.optimizer.state.get(p, {}) for name, p in module.named_parameters()}
        known[step] = {name for name, state in states.items() if any(value.any() for value in state.values())}
    assert known == {1: {"sigma", "u", "v"}, 2: {"sigma"}, 3: {"sigma", "u", "v"}, 4: set()}


def test_optimizers_keep_moments_for_the_vectors_at_work_only():
    result = train("sst", steps=2)
    state = result.trainer.optimizers[0].state
    for name, parameter in result.model.named_parameters():
        assert (parameter in state) == (not name.endswith((".U", ".V"))), name


def test_sigma_stays_float32_and_exact():
    module = projection()
    exact = module.sigma.detach().clone()
    module.to(torch.bfloat16)
    assert {name: p.dtype for name, p in module.named_parameters()} == {
        "U": torch.bfloat16, "V": torch.bfloat16, "sigma": torch.float32, "u": torch.bfloat16, "v": torch.bfloat16,
    }  # fmt: skip
    assert torch.equal(module.sigma, exact)
    y = module(torch.randn(3, 20, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert module.sigma.grad.dtype == torch.float32


@pytest.mark.parametrize("settings", [{"iteration_steps": 0}, {"iterations_per_round": 0}])
def test_arguments_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match=f"SSTCallback: {next(iter(settings))} is 0; it must be at least 1"):
        SSTCallback(**settings)
