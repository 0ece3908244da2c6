import pytest
import torch
from torch import nn

from cola_lightning.errors import InputError
from cola_lightning.methods import CoLAM
from cola_lightning.methods.cola_m.reversible import from_float8, to_float8
from tests.conftest import tiny_llama


def gradients(network, ids, weights):
    network(ids).square().mean().backward()
    return [weight.grad for weight in weights]


def test_float8_keeps_three_bits_of_each_row_whatever_its_scale():
    z = torch.randn(4, 64) * torch.tensor([[1e-6], [1.0], [1e3], [0.0]])
    back = from_float8(*to_float8(z), z.dtype)
    largest = z.abs().amax(-1, keepdim=True)
    assert ((back - z).abs() <= z.abs() / 16 + largest * 2**-16).all()
    assert to_float8(z)[0].element_size() == 1


def test_weights_that_are_views_get_their_gradients():
    """FSDP, while it computes, puts views of one flat tensor in the place of the parameters."""
    network, plain = tiny_llama(), tiny_llama()
    CoLAM("latents").apply(network)
    ids = torch.randint(300, (2, 16))
    expected = torch.cat([g.flatten() for g in gradients(plain, ids, list(plain.model.layers.parameters()))])
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in network.model.layers.parameters()]))
    start = 0
    for module in network.model.layers.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            del module._parameters[name]
            setattr(module, name, flat[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
    assert not list(network.model.layers.parameters())
    (actual,) = gradients(network, ids, [flat])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_a_stream_that_is_cast_between_layers_is_refused():
    network = tiny_llama()
    CoLAM("latents").apply(network)
    network.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0].bfloat16(), *args[1:]))
    with pytest.raises(InputError, match=r"casts it to torch\.bfloat16 between layers; set keep: residual_and_latents"):
        network(torch.randint(300, (2, 16)))


def test_hooks_of_modules_see_the_backward_pass():
    """FSDP and DeepSpeed gather and free weights in such hooks."""
    network = tiny_llama()
    CoLAM("latents").apply(network)
    order = []
    for index, layer in enumerate(network.model.layers):
        layer.register_full_backward_pre_hook(lambda *_, index=index: order.append(index))
    network(torch.randint(300, (2, 16))).sum().backward()
    assert order == [2, 1, 0]
