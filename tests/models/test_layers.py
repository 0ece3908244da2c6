"""Projections that share their input, called together, against each by itself."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cola_lightning.costs.counters import count_flops, kept_bytes
from cola_lightning.methods import SST, CoLA, CoLAM, CRNet, LaX, LoRA, LowRank, SLTrain
from cola_lightning.models import FullRank
from cola_lightning.models.rotary import rotary_table
from tests.conftest import tiny_llama

IDS = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(0))


class Calls(TorchDispatchMode):
    """How often an operation is called."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func] += 1
        return func(*args, **(kwargs or {}))


def products(run) -> int:
    with Calls() as calls:
        run()
    return calls.count[torch.ops.aten.mm.default]


def gradients(network, **options):
    loss = network(IDS, **options)
    loss = loss.square().mean() if loss.ndim else loss
    loss.backward()
    return loss, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


PROJECTIONS = {
    "full_rank": FullRank,
    "low_rank": partial(LowRank, rank=8),
    "cola": partial(CoLA, rank=8),
    "lora": partial(LoRA, rank=8, dropout=0),
    "sltrain": partial(SLTrain, rank=8, sparsity=0.1),
    "sst": partial(SST, rank=8),
    "cr_net": partial(CRNet, rank=8, start="normal"),
    "lax": partial(LaX, rank=8),
}


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_fused_projections_give_the_same(name, key_value_heads):
    plain, fused = (
        tiny_llama(PROJECTIONS[name], num_key_value_heads=key_value_heads, fused_projections=fused).double()
        for fused in (False, True)
    )
    assert plain.state_dict().keys() == fused.state_dict().keys()
    (loss, expected), (other, found) = gradients(plain), gradients(fused)
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-12)
    assert expected.keys() == found.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "separate", "forward_fused"), [("full_rank", 7, 4), ("low_rank", 14, 11), ("cola", 14, 11)]
)
def test_there_are_fewer_products(name, separate, forward_fused):
    """q, k, v make one where they made three, gate and up one where they made two. And no more in the backward pass
    than twice as many."""
    for fused, expected in ((False, separate), (True, forward_fused)):
        network = tiny_llama(PROJECTIONS[name], num_hidden_layers=1, fused_projections=fused)
        assert products(lambda n=network: n(IDS)) == expected + 1  # the head
        assert products(lambda n=network: n(IDS).sum().backward()) == 3 * (expected + 1)


def test_where_nothing_is_trained_no_matrices_are_copied():
    network = tiny_llama(fused_projections=True)
    with torch.no_grad(), Calls() as calls:
        network(IDS)
    plain = tiny_llama()
    with torch.no_grad(), Calls() as expected:
        plain(IDS)
    assert calls.count == expected.count


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"keep_attention": True}, marks=pytest.mark.slow),
        {"keep": "attention_and_mlp_latents"},
        {"keep": "latents"},
        pytest.param({"keep": "block_input"}, marks=pytest.mark.slow),
    ],
)
def test_cola_m_keeps_and_computes_as_much_and_gives_the_same(settings):
    seen = []
    for fused in (False, True):
        network = tiny_llama(num_hidden_layers=2, fused_projections=fused)
        CoLAM(**settings).apply(network)
        hidden = network.model.embed_tokens(IDS).detach().requires_grad_()
        rotary = rotary_table(20, 8, 10000.0, like=hidden)
        block = network.model.layers[1]
        known = [*network.parameters(), hidden, *rotary[:2]]
        if settings.get("keep") == "latents":  # the stream begins with the first layer
            network.model.layers[0](hidden, rotary)
        kept = kept_bytes(lambda b=block, h=hidden, r=rotary: b(h, r), known)
        flops = count_flops(lambda n=network: n(IDS).sum().backward())
        network.zero_grad()
        seen.append((kept, flops, gradients(network)[1]))
    (kept, flops, expected), (kept_fused, flops_fused, found) = seen
    assert kept_fused == kept
    assert flops_fused == flops
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
