"""CR-Net and LaX, which hand tensors on from layer to layer, against their formulas."""

from functools import partial

import pytest
import torch
from torch.nn.functional import silu

from cola_lightning.errors import InputError
from cola_lightning.methods import CRNet, LaX
from cola_lightning.methods.lax import KroneckerGate
from cola_lightning.models import Llama, LlamaConfig
from cola_lightning.models.rotary import rotary_table
from tests.conftest import tiny_llama
from tests.methods.layer_stack import Stack


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
    stack = Stack(partial(CRNet, rank=16), layers=3)
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
