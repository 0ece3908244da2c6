from types import SimpleNamespace

import pytest
import torch

from cola_lightning.errors import InputError
from cola_lightning.methods import ReLoRA, ReLoRAMerge
from cola_lightning.methods.between_steps import generator
from cola_lightning.methods.relora import moments, prune
from tests.conftest import tiny_llama
from tests.methods.runs import Snapshots, train


def trained_network(**settings):
    network = tiny_llama(lambda *sizes: ReLoRA(*sizes, rank=4, **settings)).eval()
    for module in network.modules():
        if isinstance(module, ReLoRA):
            torch.nn.init.normal_(module.B, std=0.1)
    return network


@pytest.mark.parametrize("trainable_scale", [False, True])
def test_a_merge_leaves_the_logits_as_they_were(trainable_scale):
    network = trained_network(trainable_scale=trainable_scale)
    ids = torch.randint(300, (2, 20))
    before = network(ids)
    modules = [module for module in network.modules() if isinstance(module, ReLoRA)]
    weights = [module.weight.clone() for module in modules]
    for index, module in enumerate(modules):
        module.merge(generator(0, 1, index))
    torch.testing.assert_close(network(ids), before, atol=1e-5, rtol=0)
    for module, weight in zip(modules, weights, strict=True):
        assert (module.weight - weight).norm() > 0.1 * weight.norm()
        assert module.B.count_nonzero() == 0
        assert 0.9 * module.A.shape[1] ** -0.5 < module.A.abs().max() <= module.A.shape[1] ** -0.5
    assert not torch.equal(modules[0].A, modules[1].A)
    if trainable_scale:
        assert modules[0].trained_scale == 1


@pytest.mark.parametrize(("initial_a", "learns"), [("kaiming", True), ("zero", False)])
def test_the_references_start_gives_the_branch_no_gradient(initial_a, learns):
    module = ReLoRA(20, 30, rank=5, initial_a=initial_a)
    module(torch.randn(4, 20)).square().sum().backward()
    assert bool(module.B.grad.any()) == learns
    assert not module.A.grad.any()


@pytest.mark.parametrize("ratio", [0.0, 0.8, 0.99, 0.999, 1.0])
def test_random_pruning(ratio):
    moment = torch.ones(200, 500)
    prune(moment, ratio, generator(0, 0, 0))
    assert 1 - moment.mean().item() == pytest.approx(ratio, abs=4 * (ratio * (1 - ratio) / 1e5) ** 0.5)


@pytest.mark.parametrize("ratio", [0.0, 0.8, 0.99, 1.0])
def test_magnitude_pruning_keeps_the_largest(ratio):
    moment = torch.randn(200, 500)
    before = moment.clone()
    prune(moment, ratio, None)
    kept = moment != 0
    assert kept.sum() == round((1 - ratio) * 1e5)
    assert torch.equal(moment[kept], before[kept])
    if 0 < ratio < 1:
        assert before[kept].abs().min() >= before[~kept].abs().max()


def test_merges_and_resets_have_their_own_steps():
    """Two steps, of which the first merges and the second resets."""
    merge = ReLoRAMerge(merge_every=3, reset_every=2, reset="magnitude", prune_ratio=1.0, seed=0)
    module = ReLoRA(20, 30, rank=5)
    torch.nn.init.normal_(module.B)
    merge.projections, merge.optimizer = [module], torch.optim.AdamW(module.parameters())
    module(torch.randn(4, 20)).sum().backward()
    merge.optimizer.step()
    merge.after_step(SimpleNamespace(), 1)
    assert module.B.any()
    assert all(moment.any() for moment in moments(merge.optimizer, module.A))
    merge.after_step(SimpleNamespace(), 2)
    assert module.B.any()
    for parameter in (module.A, module.B):
        assert len(moments(merge.optimizer, parameter)) == 2
        assert not any(moment.any() for moment in moments(merge.optimizer, parameter))
        assert merge.optimizer.state[parameter]["step"] == 1
    merge.after_step(SimpleNamespace(), 3)
    assert not module.B.any()


@pytest.mark.parametrize("batches", [1, 2])
def test_a_run_merges_when_it_should(batches):
    """W moves with the merges and at no other step, also where each step takes two batches."""
    name = "network.model.layers.0.self_attn.q_proj.weight"
    kept = Snapshots()
    train("relora", callbacks=[kept], steps=10, accumulate_grad_batches=batches)
    changes = [step for step in range(2, 11) if not torch.equal(kept.weights[step][name], kept.weights[step - 1][name])]
    assert changes == [4, 8]


@pytest.mark.parametrize("settings", [{"merge_every": 0}, {"reset_every": 0}, {"prune_ratio": 1.1}])
def test_arguments_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match=f"ReLoRAMerge: {next(iter(settings))} is .*; it must"):
        ReLoRAMerge(**settings)
