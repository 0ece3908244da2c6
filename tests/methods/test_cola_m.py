"""What CoLA-M costs and what it changes, counted at the 60M shapes: 4 layers, batch 4 x 256, rank 128."""

from functools import cache, partial

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition, nop
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from cola_lightning.costs.counters import count_flops, kept_bytes
from cola_lightning.methods import CoLA, CoLAM
from cola_lightning.models import Llama, LlamaConfig
from cola_lightning.models.rotary import rotary_table

SETTINGS = {
    "none": None,
    "residual_and_latents": {},
    "attention_and_mlp_latents": {"keep": "attention_and_mlp_latents"},
    "latents": {"keep": "latents"},
    "float8": {"keep": "latents", "latents_dtype": "float8"},
    "block_input": {"keep": "block_input"},
    "residual_and_latents, attention": {"keep_attention": True},
    "latents, attention": {"keep": "latents", "keep_attention": True},
    "block_input, attention": {"keep": "block_input", "keep_attention": True},
}


class Stack:
    """The decoder layers of a network, from a fixed input to a scalar."""

    def __init__(self, setting: str, dtype=torch.float32, layers=4, rows=4, gate_silu=True, autocast=False):
        torch.manual_seed(0)
        network = Llama(LlamaConfig(320, 512, 1376, layers, 8, gate_silu=gate_silu), partial(CoLA, rank=128))
        self.layers = network.to(dtype).model.layers
        if SETTINGS[setting] is not None:
            CoLAM(**SETTINGS[setting]).apply(network)
        self.x = torch.randn(rows, 256, 512).to(dtype).requires_grad_()
        self.rotary = rotary_table(256, 64, 10000.0, like=self.x)
        self.autocast = autocast
        self.parameters = list(self.layers.parameters())

    def forward(self) -> Tensor:
        x = self.x
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            for layer in self.layers:
                x = layer(x, self.rotary)
        return x

    def step(self) -> None:
        self.forward().float().square().mean().backward()

    def gradient(self) -> Tensor:
        self.step()
        return torch.cat([p.grad.float().flatten() for p in [self.x, *self.parameters]])


@cache
def flops(setting: str) -> int:
    return count_flops(Stack(setting).step)


@cache
def kept(setting: str, layers: int) -> float:
    """In bf16 hidden states per token."""
    stack = Stack(setting, torch.bfloat16, layers, rows=1)
    size = kept_bytes(stack.forward, [stack.x, *stack.parameters, *stack.rotary[:2]])
    return size / (256 * 512 * 2)


def distance(gradient: Tensor, reference: Tensor) -> float:
    return float((gradient - reference).norm() / reference.norm())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "at_most"),
    [("residual_and_latents", 1.19), ("latents", 1.205), ("float8", 1.205), ("block_input", 1.32)],
)
def test_flops_of_a_step(setting, at_most):
    assert 1.1 < flops(setting) / flops("none") <= at_most


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["residual_and_latents", "latents", "block_input"])
def test_kept_attention_is_not_done_again(keep):
    attention = 4 * 4 * 256 * 256 * 512 * 4  # scores and values, two FLOPs each, rows, layers
    assert flops(keep) - flops(f"{keep}, attention") == attention


@pytest.mark.slow
def test_flops_equal_the_arithmetic():
    """Nonlinearity aside, the step does 6 FLOPs per parameter and token, and again what the setting says."""
    tokens, d, f, r, layers = 4 * 256, 512, 1376, 128, 4
    attention = 4 * 256 * d * tokens * layers  # one forward
    up = lambda sides: 2 * tokens * r * sides * layers  # noqa: E731
    # CPU's fused backward forms the scores again, so it counts 2.5 forwards
    step = 3 * up(11 * d + 3 * f) + 3.5 * attention
    assert flops("none") == step
    assert flops("residual_and_latents") - step == up(4 * d + 2 * f) + attention
    assert flops("attention_and_mlp_latents") - step == up(8 * d + 2 * f)  # q, k, v, o whole, in place of attention
    assert flops("latents") - step == up(5 * d + 2 * f) + attention


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "at_most"),
    [
        ("residual_and_latents", 2.80),
        ("attention_and_mlp_latents", 2.80),
        ("latents", 1.80),
        ("float8", 0.95),
        ("block_input", 1.0),
        ("residual_and_latents, attention", 3.85),
        ("latents, attention", 2.85),
    ],
)
def test_bytes_that_one_more_layer_keeps(setting, at_most):
    assert kept("none", 2) - kept("none", 1) > 20
    one_more = kept(setting, 3) - kept(setting, 2)
    assert at_most * 0.9 < one_more <= at_most


def test_reversal_keeps_one_residual_stream_for_the_whole_network():
    once = 3 * kept("latents", 2) - 2 * kept("latents", 3)
    assert once <= 2.01  # one in float32; it is also what the final norm reads


@pytest.mark.slow
@pytest.mark.parametrize("gate_silu", [True, False])
@pytest.mark.parametrize(
    "setting",
    [
        "residual_and_latents",
        "attention_and_mlp_latents",
        "block_input",
        "residual_and_latents, attention",
        "block_input, attention",
    ],
)
def test_gradients_are_bit_equal_over_24_layers(setting, gate_silu):
    settings = {"layers": 24, "rows": 1, "gate_silu": gate_silu}
    assert torch.equal(Stack(setting, **settings).gradient(), Stack("none", **settings).gradient())


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["latents", "latents, attention"])
def test_reversal_in_float32_over_24_layers(setting):
    settings = {"layers": 24, "rows": 1}
    assert distance(Stack(setting, **settings).gradient(), Stack("none", **settings).gradient()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "slack"), [({"dtype": torch.bfloat16}, 1), ({"autocast": True}, 1.05)], ids=["bf16-true", "bf16-mixed"]
)
def test_reversal_under_bf16_over_24_layers_is_no_further_from_float32_than_bf16_is(settings, slack):
    """In pure bf16 the float32 stream is nearer. Under autocast the two differ by rounding alone, to either side."""
    exact = Stack("none", layers=24, rows=1).gradient()
    plain = distance(Stack("none", layers=24, rows=1, **settings).gradient(), exact)
    assert distance(Stack("latents", layers=24, rows=1, **settings).gradient(), exact) <= plain * slack


@pytest.mark.slow
def test_float8_costs_the_accuracy_that_is_documented():
    exact = Stack("none").gradient()
    assert 1e-3 < distance(Stack("float8").gradient(), exact) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("setting", list(SETTINGS)[1:])
def test_compiled_layers_give_the_same(setting):
    plain, compiled = (Stack(setting, layers=1, rows=1) for _ in range(2))
    for layer in compiled.layers:
        layer.compile()
    assert distance(compiled.gradient(), plain.gradient()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "again"),
    [("none", 0), ("residual_and_latents", 6), ("attention_and_mlp_latents", 10), ("block_input", 13)],
)
def test_compiled_layers_compute_no_product_again_whose_output_is_kept(setting, again):
    """In the compiled backward pass: two products for each of 14 factors, and those that are done again."""
    products = []

    def backward(graph, inputs):
        products.append(sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    partition = min_cut_rematerialization_partition
    backend = aot_autograd(fw_compiler=nop, bw_compiler=backward, partition_fn=partition)
    stack = Stack(setting, layers=1, rows=1)
    stack.layers[0].compile(backend=backend)
    stack.step()
    assert products == [28 + again]


def test_two_passes_may_be_under_way_at_once():
    stack, reference = Stack("latents", layers=2, rows=1), Stack("none", layers=2, rows=1)
    for each in (stack, reference):
        first = each.forward().square().mean()
        second = (each.forward() * 2).square().mean()
        first.backward()
        second.backward()
    assert distance(stack.x.grad, reference.x.grad) < 1e-5


def test_validation_is_not_checkpointed():
    for setting in ("residual_and_latents", "latents"):
        stack = Stack(setting, layers=1, rows=1)
        stack.layers[0].recompute = None  # it would fail if it were called
        with torch.no_grad():
            plain = stack.forward()
        stack = Stack(setting, layers=1, rows=1)
        calls = []
        stack.layers[0].recompute = lambda *args, calls=calls: calls.append(args)
        with torch.no_grad():
            assert torch.equal(stack.forward(), plain)
        assert not calls
