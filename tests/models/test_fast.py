"""The fast paths against the plain ones."""

import math
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cola_lightning.callbacks import CoLAM
from cola_lightning.costs.counters import count_flops, kept_bytes
from cola_lightning.errors import InputError
from cola_lightning.methods import SST, CoLA, CRNet, LaX, LoRA, LowRank, SLTrain
from cola_lightning.models import FullRank
from cola_lightning.models.layers import Head
from cola_lightning.models.llama import rotary_table
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


# -- projections that share their input -------------------------------------------------------------------------------

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
def test_projections_called_together_give_the_same(name, key_value_heads):
    plain, fused = (
        tiny_llama(PROJECTIONS[name], num_key_value_heads=key_value_heads, fused_projections=fused)
        for fused in (False, True)
    )
    assert plain.state_dict().keys() == fused.state_dict().keys()
    (loss, expected), (other, found) = gradients(plain), gradients(fused)
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-7)
    assert expected.keys() == found.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "separate", "together"), [("full_rank", 7, 4), ("low_rank", 14, 11), ("cola", 14, 11)]
)
def test_there_are_fewer_products(name, separate, together):
    """q, k, v make one where they made three, gate and up one where they made two. And no more in the backward pass
    than twice as many."""
    for fused, expected in ((False, separate), (True, together)):
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


@pytest.mark.parametrize("settings", [{}, {"keep_attention": True}, {"keep": "latents"}, {"keep": "block_input"}])
def test_cola_m_keeps_and_computes_as_much_and_gives_the_same(settings):
    seen = []
    for fused in (False, True):
        network = tiny_llama(fused_projections=fused)
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


# -- loss in chunks ---------------------------------------------------------------------------------------------------

TARGETS = torch.where(torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) < 0.8, IDS.roll(-1, 1), -100)


@pytest.mark.parametrize("size", [1, 7, 40, 1000])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_in_chunks_is_the_same(size, reduction):
    plain, other = tiny_llama(), tiny_llama(loss_chunk_size=size)
    losses, found = (network(IDS, targets=TARGETS, reduction=reduction) for network in (plain, other))
    assert losses.shape == (() if reduction == "sum" else TARGETS.shape)
    torch.testing.assert_close(found, losses, rtol=1e-6, atol=1e-6)
    if reduction == "none":
        assert (found[TARGETS == -100] == 0).all()
    for each in (losses, found):
        (each.sum() / 3).backward()
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_loss_in_chunks_in_bf16_is_as_near_to_float32(autocast):
    """As the plain one, by autocast and with weights in bf16; but that each chunk's share of the weight's gradient is
    rounded to bf16, by 2^-9 at most, before they are added up."""
    exact = gradients(tiny_llama(), targets=TARGETS, reduction="sum")

    def distance(size):
        network = tiny_llama(loss_chunk_size=size)
        network = network if autocast else network.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, found = gradients(network, targets=TARGETS, reduction="sum")
        name = "lm_head.weight"
        assert loss.dtype == torch.float32
        off = (found[name].float() - exact[1][name]).norm() / exact[1][name].norm()
        return abs(loss.item() - exact[0].item()), off

    (loss, gradient), (plain_loss, plain_gradient) = distance(7), distance(None)
    assert gradient < math.hypot(plain_gradient, 1.2 * 2**-9)
    assert loss == pytest.approx(plain_loss, abs=1e-3)


def test_the_logits_never_exist_at_once():
    """4,096 tokens by 32,000 are 524 MB, a chunk of 128 of them 16 MB; each is there with its softmax or gradient."""
    head = {size: Head(8, 32000, size) for size in (None, 128)}
    x, targets = torch.randn(1, 4096, 8), torch.randint(32000, (1, 4096))

    def peak(size):
        def high() -> int:
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

        Path("/proc/self/clear_refs").write_text("5")
        before = high()
        head[size](x, targets, "sum").backward()
        return high() - before

    peak(128)  # what is loaded at first use
    assert peak(128) < 150e6
    assert peak(None) > 900e6


def test_flops_of_a_loss_in_chunks_are_those_of_the_plain_one():
    plain, other = tiny_llama(), tiny_llama(loss_chunk_size=7)
    steps = [count_flops(lambda n=n: n(IDS, targets=TARGETS, reduction="sum").backward()) for n in (plain, other)]
    assert steps[0] == steps[1]


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="loss_chunk_size is 0; it must be at least 1, or null"):
        tiny_llama(loss_chunk_size=0)
