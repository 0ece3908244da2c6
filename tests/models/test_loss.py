"""The loss of a head whose logits never exist at once, against the plain one."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cola_lightning.costs.counters import count_flops
from cola_lightning.errors import InputError
from cola_lightning.models import loss
from cola_lightning.models.layers import Head
from cola_lightning.models.loss import chunk_bounds
from tests.conftest import tiny_llama
from tests.models.test_layers import IDS, gradients

TARGETS = torch.where(torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) < 0.8, IDS.roll(-1, 1), -100)


@pytest.mark.parametrize("size", [1, 7, 40, 1000])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_in_chunks_is_the_same(size, reduction):
    plain, other = tiny_llama().double(), tiny_llama(loss_chunk_size=size).double()
    losses, found = (network(IDS, targets=TARGETS, reduction=reduction) for network in (plain, other))
    assert losses.shape == (() if reduction == "sum" else TARGETS.shape)
    torch.testing.assert_close(found, losses, rtol=1e-12, atol=1e-12)
    if reduction == "none":
        assert (found[TARGETS == -100] == 0).all()
    for each in (losses, found):
        (each.sum() / 3).backward()
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


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


def head_loss(dtype, size=None, compiled=False, autocast=False):
    """Return a loss of a head of 300 ids for 50 tokens, and the gradients of its input and its weight."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(2, 25, 32, generator=draw).to(torch.float32 if autocast else dtype).requires_grad_()
    head = Head(32, 300, size).to(x.dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(300, 32, generator=draw))
    if compiled:
        head.compile()
    targets = torch.randint(300, (2, 25), generator=draw)
    targets[0, ::3] = -100
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = head(x, targets, "sum")
    (loss / 33).backward()
    return loss.detach(), x.grad, head.weight.grad


@pytest.mark.slow
@pytest.mark.parametrize("size", [20, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_chunks_give_the_same(dtype, size):
    """As the plain loss of the whole, to 1e-6 in float32; 20 does not divide the 50 tokens."""
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for ours, plain in zip(head_loss(dtype, size, compiled=True), head_loss(dtype), strict=True):
        assert ours.dtype == dtype
        assert (ours - plain).norm() < tolerance * plain.norm()


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [True, False])
def test_compiled_chunks_in_bf16_are_within_a_tenth_of_its_distance(autocast):
    """Compare with the same chunks uncompiled: compiling changes little beside what bf16 itself changes."""
    exact = head_loss(torch.float64)
    found = head_loss(torch.bfloat16, 20, compiled=True, autocast=autocast)
    for ours, plain, right in zip(found, head_loss(torch.bfloat16, 20, autocast=autocast), exact, strict=True):
        assert (ours - plain).norm() < 0.1 * (plain - right).norm()


def test_one_kernel_is_compiled_for_the_logits_of_all_chunks(monkeypatch):
    """Not one of each chunk, as when the whole loop is compiled."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    loss.compile_once.cache_clear()
    head_loss(torch.float32, 20, compiled=True)
    head_loss(torch.float32, 20, compiled=True)
    loss.compile_once.cache_clear()
    assert len(compiled) == 1


@pytest.mark.parametrize(("length", "size"), [(10, 4), (10, 10), (10, 1), (7, 100), (2048, 600), (0, 5)])
def test_chunks_are_few_and_even(length, size):
    bounds = chunk_bounds(length, size)
    assert [bounds[0][0], bounds[-1][1]] == [0, length]
    assert all(end == begin for (_, end), (begin, _) in pairwise(bounds))
    sizes = [end - begin for begin, end in bounds]
    assert max(sizes) - min(sizes) <= 1
    assert len(bounds) == max(1, math.ceil(length / size))


def test_a_loss_without_gradients_costs_one_product():
    """A validation needs neither gradient, of which each costs a product as large as the logits'."""
    head, x = Head(8, 32, 7), torch.randn(2, 20, 8)
    targets = torch.zeros(2, 20, dtype=torch.int64)
    with torch.no_grad():
        assert count_flops(lambda: head(x, targets, "sum")) == 2 * 40 * 8 * 32


@pytest.mark.slow
def test_the_logits_never_exist_at_once():
    """4,096 tokens by 32,000 are 524 MB, a chunk of 128 of them 16 MB, and 64 of their probabilities 8 MB."""
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
    assert peak(128) < 60e6
    assert peak(None) > 900e6


def test_flops_of_a_loss_in_chunks_are_those_of_the_plain_one():
    plain, other = tiny_llama(), tiny_llama(loss_chunk_size=7)
    steps = [count_flops(lambda n=n: n(IDS, targets=TARGETS, reduction="sum").backward()) for n in (plain, other)]
    assert steps[0] == steps[1]


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="loss_chunk_size is 0; it must be at least 1, or null"):
        tiny_llama(loss_chunk_size=0)
