import pytest
import torch

from cola_lightning.methods import LoRA
from tests.methods.runs import copy_weights, train
from tests.recorder import Recorder


def test_formula():
    module = LoRA(20, 30, rank=5, alpha=32).double().eval()
    torch.nn.init.normal_(module.B)
    x = torch.randn(2, 3, 20, dtype=torch.float64)
    expected = x @ module.weight.T + 32 / 5 * x @ module.A.T @ module.B.T
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=1e-12)


def test_dropout_touches_the_branch_alone():
    module = LoRA(20, 30, rank=5, dropout=0.5)
    torch.nn.init.normal_(module.B)
    x = torch.randn(4000, 20)
    with torch.no_grad():
        branch = module(x) - x @ module.weight.T
        module.eval()
        full = module(x) - x @ module.weight.T
    assert (branch - full).norm() > 0.5 * full.norm()
    torch.testing.assert_close(branch.mean(0), full.mean(0), atol=6 * float(branch.std()) / 4000**0.5, rtol=0)


def test_start():
    torch.manual_seed(0)
    module = LoRA(400, 600, rank=100)
    assert module.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert module.A.abs().max() <= 1 / 20
    assert module.A.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.03)
    assert module.B.count_nonzero() == 0


def test_frozen_weights_neither_move_nor_decay_and_everything_else_trains():
    kept = Recorder(weights=copy_weights)
    train("lora", callbacks=[kept], steps=4)
    before, after = (kept.by_step("weights")[step] for step in (1, 4))
    for name, tensor in before.items():
        frozen = name.endswith("proj.weight")
        assert torch.equal(tensor, after[name]) == frozen, name
