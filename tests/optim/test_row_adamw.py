import pytest
import torch
from torch import nn
from torch.optim import AdamW

from cola_lightning.errors import InputError
from cola_lightning.optim import RowAdamW

SETTINGS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((6, 5), (4,), (), (3, 2, 2))]


def steps(optimizer, params, count, seed=1):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
        optimizer.step()


def test_equals_adamw_as_long_as_nothing_is_restarted():
    ours, theirs = parameters(), parameters()
    one, other = RowAdamW(ours, **SETTINGS), AdamW(theirs, **SETTINGS)
    for group, optimizer in ((ours, one), (theirs, other)):
        steps(optimizer, group, 10)
        optimizer.param_groups[0]["lr"] = 0.01  # as a schedule does
        steps(optimizer, group, 10, seed=2)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(one.state[actual][moment], other.state[expected][moment], rtol=1e-6, atol=1e-7)


def test_parameters_without_gradient_are_left_alone():
    frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)
    trained = nn.Parameter(torch.ones(3, 3))
    optimizer = RowAdamW([frozen, trained], **SETTINGS)
    trained.grad = torch.ones(3, 3)
    optimizer.step()
    assert (frozen == 1).all()
    assert (trained < 1).all()
    assert frozen not in optimizer.state


def test_a_restarted_row_is_held_and_then_goes_on_from_nothing():
    params = parameters()
    optimizer = RowAdamW(params, **SETTINGS)
    reference = parameters()
    plain = RowAdamW(reference, **SETTINGS)
    for group, each in ((params, optimizer), (reference, plain)):
        steps(each, group, 4)
    matrix = params[0]
    optimizer.restart(matrix, torch.tensor([1, 4]), hold=3)
    for count in range(1, 4):
        before = matrix.detach().clone()
        steps(optimizer, params, 1, seed=count)
        steps(plain, reference, 1, seed=count)
        assert torch.equal(matrix[[1, 4]], before[[1, 4]])
        torch.testing.assert_close(matrix[[0, 2, 3, 5]], reference[0][[0, 2, 3, 5]], rtol=0, atol=0)
    assert not optimizer.state[matrix]["exp_avg"][[1, 4]].any()
    assert optimizer.state[matrix]["step"].flatten().tolist() == [7, 3, 7, 7, 3, 7]
    before = matrix.detach().clone()
    steps(optimizer, params, 1, seed=9)
    gradient = matrix.grad[[1, 4]]
    # The first step afterwards: m = (1 - β1) g and v = (1 - β2) g², corrected as at the fourth.
    m, v = 0.2 * gradient / (1 - 0.8**4), 0.05 * gradient.square() / (1 - 0.95**4)
    expected = before[[1, 4]] * (1 - 0.05 * 0.1) - 0.05 * m / (v.sqrt() + 1e-6)
    torch.testing.assert_close(matrix[[1, 4]], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_goes_on_from_a_state_as_if_it_had_never_stopped(dtype):
    """The counters would not survive in bf16, which cannot hold 301."""
    whole, broken = ([nn.Parameter(p.detach().to(dtype)) for p in parameters()] for _ in range(2))
    first, second = RowAdamW(whole, **SETTINGS), RowAdamW(broken, **SETTINGS)
    for optimizer, group in ((first, whole), (second, broken)):
        steps(optimizer, group, 301)
        optimizer.restart(group[0], torch.tensor([2]), hold=5)
        steps(optimizer, group, 2, seed=2)
    resumed = RowAdamW(broken, **SETTINGS)
    resumed.load_state_dict(second.state_dict())
    assert resumed.state[broken[0]]["step"].dtype == torch.float32
    assert resumed.state[broken[0]]["step"].flatten().tolist() == [303, 303, 2, 303, 303, 303]
    steps(first, whole, 6, seed=3)
    steps(resumed, broken, 6, seed=3)
    for one, other in zip(whole, broken, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == dtype


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}])
def test_refuses_what_makes_no_sense(settings):
    with pytest.raises(InputError, match=r"RowAdamW: .* must"):
        RowAdamW(parameters(), **settings)
