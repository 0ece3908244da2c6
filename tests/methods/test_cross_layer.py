"""CR-Net and LaX: tensors from layer to layer, and CR-Net's recovery of them in the backward pass."""

from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from cola_lightning.costs.counters import count_flops, kept_bytes
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA, CoLAM, CRNet, CRNetRecompute, LaX
from cola_lightning.methods.cr_net import Recompute, _Recover
from cola_lightning.methods.lax import KroneckerGate
from cola_lightning.models import Llama, LlamaConfig
from cola_lightning.models.llama import run_layers
from cola_lightning.models.rotary import rotary_table
from tests.conftest import tiny_llama

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Stack:
    """Decoder layers from a fixed input to a scalar, their weights stirred so that nothing is zero."""

    def __init__(self, projection, policy=None, layers=4, dtype=torch.float32, sizes=(64, 96, 4), autocast=False):
        torch.manual_seed(0)
        d, f, heads = sizes
        self.network = Llama(LlamaConfig(50, d, f, layers, heads), projection)
        for name, p in self.network.named_parameters():
            if "beta" in name:
                torch.nn.init.normal_(p, mean=0.8, std=0.1)
            elif name.endswith("B.weight"):
                torch.nn.init.normal_(p, std=0.05)
        self.network.to(dtype)
        if policy:
            policy(self.network)
        self.layers = self.network.model.layers
        self.x = torch.randn(2, 16, d).to(dtype).requires_grad_()
        self.rotary = rotary_table(16, d // heads, 10000.0, like=self.x)
        self.parameters = list(self.layers.parameters())
        self.autocast = autocast

    def forward(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return run_layers(self.layers, self.x, self.rotary)

    def step(self) -> None:
        self.forward().float().square().mean().backward()

    def gradient(self) -> Tensor:
        self.step()
        return torch.cat([p.grad.float().flatten() for p in [self.x, *self.parameters]])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def recompute(anchor_every=8):
    return Recompute(anchor_every).attach


cr_net = partial(CRNet, rank=16)


# -- formulas ---------------------------------------------------------------------------------------------------------


def test_cr_net_follows_its_formula():
    module = CRNet(20, 30, rank=5, start="normal")
    x, before = torch.randn(2, 20), torch.randn(2, 30)
    for beta in (0.7, -0.7, 0.0):
        torch.nn.init.constant_(module.beta.weight, beta)
        y, handed_on = module(x, before)
        scale = beta + 1e-6 if beta >= 0 else beta - 1e-6
        torch.testing.assert_close(y, scale * before + x @ module.A.weight.T @ module.B.weight.T)
        assert torch.equal(y, handed_on)


def test_every_position_of_a_network_adds_to_its_own_in_the_layer_before():
    """The network, against its projections called by hand, layer by layer."""
    stack = Stack(cr_net, layers=3)
    seen = {}
    for number, layer in enumerate(stack.layers):
        for part in (layer.self_attn, layer.mlp):
            for name, projection in part.named_children():
                projection.register_forward_hook(
                    lambda module, args, out, key=(number, name): seen.update({key: (args[0], out[0])})
                )
    stack.forward()
    for number, name in seen:
        x, y = seen[number, name]
        part = stack.layers[number].self_attn if name[0] in "qkvo" else stack.layers[number].mlp
        weights = getattr(part, name)
        if number == 0:
            expected = x @ weights.weight.T
        else:
            added = x @ weights.A.weight.T @ weights.B.weight.T
            expected = (weights.beta.weight + 1e-6) * seen[number - 1, name][1] + added
        torch.testing.assert_close(y, expected)
    assert len(seen) == 21


def test_lax_is_cola_in_the_first_layer_and_has_gate_and_norm_in_the_others():
    """The formula itself is tested against the authors' code in test_golden.py."""
    torch.manual_seed(0)
    stack = Stack(partial(LaX, rank=24), layers=3)
    shapes = [{name: tuple(p.shape) for name, p in layer.self_attn.q_proj.named_parameters()} for layer in stack.layers]
    cola = {"A.weight": (24, 64), "B.weight": (64, 24)}
    norm = {"latent_norm.weight": (24,), "latent_norm.bias": (24,)}
    assert shapes[0] == cola
    assert shapes[1] == shapes[2] == cola | norm | {"latent_gate.left": (6, 6), "latent_gate.right": (4, 4)}
    first, x = stack.layers[0].self_attn.q_proj, torch.randn(2, 64)
    y, h = first(x, None)
    torch.testing.assert_close(y, silu(x @ first.A.weight.T) @ first.B.weight.T)
    torch.testing.assert_close(h, silu(x @ first.A.weight.T))


@pytest.mark.parametrize(("rank", "sides"), [(256, (16, 16)), (128, (16, 8)), (7, (7, 1)), (1, (1, 1))])
def test_laxs_gate_multiplies_by_a_kronecker_product_and_starts_kaiming_uniform(rank, sides):
    gate = KroneckerGate(rank)
    assert (len(gate.left), len(gate.right)) == sides
    h = torch.randn(2, 3, rank)
    torch.testing.assert_close(gate(h), h @ torch.kron(gate.right, gate.left))
    for matrix in (gate.left, gate.right):
        bound = (6 / len(matrix)) ** 0.5
        assert matrix.abs().max() <= bound
        if len(matrix) == 16:
            assert matrix.abs().max() > 0.9 * bound


def test_choices_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match=r"LaX: gate is 1\.0; it must be kronecker or identity"):
        LaX(20, 30, rank=5, gate=1.0)
    with pytest.raises(InputError, match="CRNet: start is one; it must be zero or normal"):
        CRNet(20, 30, rank=5, start="one")


def test_cr_net_starts_as_a_network_that_repeats_its_first_outputs():
    network = tiny_llama(partial(CRNet, rank=8))
    block = network.model.layers[1]
    received = tuple(torch.randn(1, 4, p.out_features) for p in block.self_attn.children())
    received += tuple(torch.randn(1, 4, p.out_features) for p in block.mlp.children())
    _, *handed_on = block(torch.randn(1, 4, 32), rotary_table(4, 8, 10000.0, like=received[0]), *received)
    for before, after in zip(received, handed_on, strict=True):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


# CR-Net at CoLA's number of parameters: width, intermediate size, layers, heads, rank, millions in all
SIZES = {
    "60M": (512, 1376, 8, 8, 103, 42.8),
    "130M": (768, 2048, 12, 12, 235, 94.0),
    "350M": (1024, 2736, 24, 16, 238, 185.2),
    "1B": (2048, 5461, 24, 32, 448, 583.3),
}


@pytest.mark.parametrize("size", SIZES)
def test_cr_nets_parameters(size):
    d, f, layers, heads, rank, millions = SIZES[size]
    with torch.device("meta"):
        network = Llama(LlamaConfig(32000, d, f, layers, heads), partial(CRNet, rank=rank))
    counts = [sum(p.numel() for p in part.parameters()) for part in (network.model.layers, network)]
    assert counts[0] - 2 * layers * d == 4 * d * d + 3 * d * f + (layers - 1) * (rank * (11 * d + 3 * f) + 7)
    assert counts[1] / 1e6 == pytest.approx(millions, rel=0.005)


# -- recomputation ----------------------------------------------------------------------------------------------------


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
