"""Recomputation on CR-Net and LaX: CR-Net's recovery of outputs in the backward pass, and CoLA-M."""

from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch

from cola_lightning.costs.counters import count_flops, kept_bytes
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA, CoLAM, CRNet, CRNetRecompute, LaX
from cola_lightning.methods.cr_net import Recompute, _Recover
from tests.conftest import tiny_llama
from tests.methods.layer_stack import Stack, distance


def recompute(anchor_every=8):
    return Recompute(anchor_every).attach


cr_net = partial(CRNet, rank=16)


# -- CR-Net's recovery ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor_every", [1, 3, 8])
def test_recovered_outputs_equal_those_of_the_forward_pass(anchor_every, monkeypatch):
    stack = Stack(cr_net, recompute(anchor_every), layers=8)
    forward, recovered = {}, {}
    for number, layer in enumerate(stack.layers):
        layer.register_forward_hook(lambda module, args, out, number=number: forward.update({number: out[1:]}))
    loss = stack.forward().square().mean()
    taken = _Recover.__init__

    def note(self, latents, outputs):
        recovered[len(stack.layers) - 1 - len(recovered)] = outputs
        taken(self, latents, outputs)

    monkeypatch.setattr(_Recover, "__init__", note)
    loss.backward()
    assert recovered.keys() == forward.keys() == set(range(8))
    for number in forward:
        assert len(recovered[number]) == 7
        for ours, expected in zip(recovered[number], forward[number], strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("anchor_every", [1, 3, 8])
def test_gradients_equal_those_without(anchor_every):
    exact = Stack(cr_net, layers=8).gradient()
    assert distance(Stack(cr_net, recompute(anchor_every), layers=8).gradient(), exact) < 1e-5


def test_errors_grow_where_beta_is_small_and_anchors_stop_that():
    """Each recovery divides by s: over 7 layers at β = 0.3 the error of float32 grows by 0.3^-7, 4,600 times."""

    def small(policy):
        def prepare(network):
            for name, p in network.named_parameters():
                if "beta" in name:
                    torch.nn.init.constant_(p, 0.3)
            if policy:
                policy(network)

        return prepare

    exact = Stack(cr_net, small(None), layers=8).gradient()
    far, near = (distance(Stack(cr_net, small(recompute(n)), layers=8).gradient(), exact) for n in (8, 2))
    assert near < 1e-5 < far < 1e-2


@pytest.mark.parametrize("settings", [{"dtype": torch.bfloat16}, {"autocast": True}], ids=["bf16-true", "bf16-mixed"])
def test_under_bf16_it_is_no_further_from_float32_than_bf16_is(settings):
    exact = Stack(cr_net, layers=8).gradient()
    plain = distance(Stack(cr_net, layers=8, **settings).gradient(), exact)
    assert distance(Stack(cr_net, recompute(), layers=8, **settings).gradient(), exact) <= plain * 1.2


WIDE = {"sizes": (128, 344, 4), "projection": partial(CRNet, rank=32)}


@cache
def flops(policy) -> int:
    return count_flops(Stack(**WIDE, layers=4, policy=policy).step)


def test_of_the_products_only_up_projections_and_attention_are_done_again():
    tokens, d, f, r = 2 * 16, 128, 344, 32
    again = 3 * 2 * tokens * r * (5 * d + 2 * f) + 4 * 4 * 16 * d * tokens  # three layers; attention in all four
    assert flops(recompute(1)) - flops(None) == again


@pytest.mark.slow
def test_bytes_that_one_more_layer_keeps():
    def kept(layers, policy):
        stack = Stack(**WIDE, layers=layers, policy=policy, dtype=torch.bfloat16)
        return kept_bytes(stack.forward, [stack.x, *stack.parameters, *stack.rotary[:2]]) / (2 * 16 * 128 * 2)

    at_most = 1 + 7 * 32 / 128  # its input and seven latents, in bf16 hidden states
    assert kept(4, recompute(99)) - kept(3, recompute(99)) == pytest.approx(at_most, rel=0.01)
    assert kept(4, None) - kept(3, None) > 20


@pytest.mark.slow
def test_compiled_layers_give_the_same():
    for projection, policy in ((cr_net, lambda: None), (cr_net, recompute), (partial(LaX, rank=16), lambda: None)):
        plain, compiled = (Stack(projection, policy(), layers=2) for _ in range(2))
        for layer in compiled.layers:
            layer.compile(backend="eager")
        assert distance(compiled.gradient(), plain.gradient()) < 1e-5


# -- CoLA-M on cross-layer methods ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["residual_and_latents", "block_input"])
def test_cola_m_on_lax_gives_bit_equal_gradients(keep):
    lax = partial(LaX, rank=16)
    assert torch.equal(Stack(lax, CoLAM(keep).apply).gradient(), Stack(lax).gradient())


@pytest.mark.slow
def test_cola_m_keeps_the_seven_cross_layer_latents_of_lax_beside_those_of_cola():
    def kept(projection, layers):
        stack = Stack(partial(projection, rank=16), CoLAM().apply, layers)
        return kept_bytes(stack.forward, [stack.x, *stack.parameters, *stack.rotary[:2]])

    handed_on = 7 * 16 * 2 * 16 * 4  # seven, rank 16, 2 x 16 tokens, float32
    assert kept(LaX, 4) - kept(LaX, 3) == kept(CoLA, 4) - kept(CoLA, 3) + handed_on


def test_block_input_goes_over_cr_net():
    assert torch.equal(Stack(cr_net, CoLAM("block_input").apply).gradient(), Stack(cr_net).gradient())


@pytest.mark.parametrize(
    ("network", "policy", "message"),
    [
        (
            partial(LaX, rank=8),
            CoLAM("latents").apply,
            "q_proj is LaX, which passes a tensor to the next layer",
        ),
        (partial(CRNet, rank=8), CoLAM().apply, "q_proj is FirstOfCRNet; set keep: block_input"),
        (partial(CoLA, rank=8), recompute(), "q_proj is CoLA; set --model.projection CRNet"),
    ],
)
def test_what_cannot_work_is_refused(network, policy, message):
    with pytest.raises(InputError, match=message):
        policy(tiny_llama(network))


def test_two_ways_of_checkpointing_are_refused():
    with pytest.raises(InputError, match="anchor_every is 0"):
        CRNetRecompute(0)
    trainer = SimpleNamespace(callbacks=[CoLAM("block_input")])
    with pytest.raises(InputError, match="CRNetRecompute and CoLAM are both"):
        CRNetRecompute().setup(trainer, SimpleNamespace(transforms=[]), "fit")
