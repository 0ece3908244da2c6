import pytest
import torch
from torch import nn

from cola_lightning.costs.counters import kept_bytes
from cola_lightning.methods import SLTrain
from tests.methods.test_projections import moved


def projection():
    return moved(lambda *sizes: SLTrain(*sizes, rank=5, sparsity=0.2), 20, 30)


def dense_expression(module):
    """``W = scale B A + S`` as autograd takes it."""
    sparse = torch.zeros(30 * 20).scatter(0, module.support.long(), module.values).view(30, 20)
    return 32 / 5 * (module.B @ module.A) + sparse


def test_output_and_gradients_equal_those_of_the_dense_expression():
    module = projection()
    x = torch.randn(2, 3, 20, requires_grad=True)
    wanted = [x, *module.parameters()]
    weight = torch.randn(2, 3, 30)
    actual, expected = module(x), x @ dense_expression(module).T
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    gradients = zip(
        torch.autograd.grad((actual * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    )
    for actual, expected in gradients:
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


def test_gradients_under_autocast_are_near_and_in_the_parameters_dtype():
    module, x = projection(), torch.randn(2, 3, 20)
    module(x).square().sum().backward()
    exact = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for parameter, expected in zip(module.parameters(), exact, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - expected).norm() < 0.03 * expected.norm()


@pytest.mark.slow
def test_nothing_is_kept_but_the_input():
    """A dense layer that forms W by plain autograd keeps it."""
    module, x = SLTrain(256, 512, rank=16), torch.randn(8, 256, requires_grad=True)
    known = [x, *module.parameters(), *module.buffers()]
    assert kept_bytes(lambda: module(x), known) == 0
    assert kept_bytes(lambda: x @ module.dense().T, known) >= 4 * 256 * 512
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_bytes(lambda: module(x), known) == 2 * x.numel()  # the input as it was cast


def test_support_is_random_sorted_without_repetition_and_saved():
    torch.manual_seed(0)
    one, other = (SLTrain(64, 96, rank=4, sparsity=0.03) for _ in range(2))
    for module in (one, other):
        assert module.support.dtype == torch.int32
        assert len(module.support.unique()) == len(module.support) == int(0.03 * 64 * 96)
        assert (module.support.diff() > 0).all()
        assert module.support.max() < 64 * 96
    assert not torch.equal(one.support, other.support)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.dense(), other.dense())


def test_start():
    module = SLTrain(400, 600, rank=100)
    assert module.B.count_nonzero() == 0
    for values in (module.A, module.values):
        assert values.abs().max() <= 1 / 20
        assert values.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.03)


def test_only_floating_point_is_cast():
    module = SLTrain(64, 96, rank=4).to(torch.bfloat16)
    assert module.support.dtype == torch.int32
    assert nn.Module.state_dict(module)["values"].dtype == torch.bfloat16
    assert module(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
