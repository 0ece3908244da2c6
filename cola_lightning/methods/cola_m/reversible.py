"""CoLA-M without the residual stream: a layer is run backwards from its output and its latents.

With ``x' = x + expand(z)`` and z kept, the input is ``x = x' - expand(z)``. So from the last layer's output, layer by
layer downwards, every residual stream comes back, and only the seven R-wide latents of a layer need to be kept:
1.75 D numbers per token at R = D / 4, against 2.75 D with the layer's input. The price is that the up-projections of o
and down are done again too. The stream runs in float32, so that subtracting gives back what was added.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from cola_lightning.errors import InputError
from cola_lightning.methods.low_rank import LowRank
from cola_lightning.models.activation_checkpointing import set_recompute
from cola_lightning.models.block import Block
from cola_lightning.models.llama import Llama
from cola_lightning.models.loss import at_least_float32
from cola_lightning.models.rotary import Rotary
from cola_lightning.private_apis import ATTENTION_OPS

MakeLatent = Callable[[LowRank, Tensor], Tensor]
"""``f(projection, x)`` is the latent (B, T, R) of ``projection`` for its input ``x``, made or remembered."""


class Stream:
    """The residual stream (B, T, D) where the pass over the layers stands, upwards and then downwards."""

    value: Tensor


class Reversible:
    """Keep a layer's latents only.

    Args:
        float8: Keep them in 8 bits (e4m3) with a scale for each token.
        attention: Keep the attention's output and its log-sum-exp, so that attention is not done again.
    """

    def __init__(self, float8: bool, attention: bool) -> None:
        self.float8, self.attention = float8, attention

    def attach(self, network: Llama) -> None:
        """Make every layer of ``network`` run through this scheme in training."""
        self.first = network.model.layers[0]
        for block in network.model.layers:
            set_recompute(block, self)

    # Not traced: what happens in backward below is no graph that torch.compile could hold.
    @torch.compiler.disable
    def __call__(self, block: Block, x: Tensor, rotary: Rotary) -> Tensor:
        if block is self.first:
            self.stream = Stream()  # one for each pass, should several be under way before the first goes backwards
        elif x.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"CoLAM with keep: latents needs a float32 residual stream, but the strategy casts it to {x.dtype} "
                f"between layers; set keep: residual_and_latents, or let the strategy leave the layers' inputs alone"
            )
        return _Run.apply(self, block, at_least_float32(x), rotary, *weights_of(block))


def attention_latent(block: Block, x: Tensor, rotary: Rotary, latent: MakeLatent, mix_context: Any) -> Tensor:
    """From the layer's input (B, T, D) to the latent of its o-projection (B, T, R)."""
    attn = block.self_attn
    h = block.input_layernorm(x.to(block.input_layernorm.weight.dtype))
    q, k, v = (proj.expand(latent(proj, h)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    with mix_context:
        y = attn.mix(q, k, v, rotary)
    return latent(attn.o_proj, y)


def mlp_latent(block: Block, x: Tensor, latent: MakeLatent) -> Tensor:
    """From the stream after attention (B, T, D) to the latent of the down-projection (B, T, R)."""
    mlp = block.mlp
    h = block.post_attention_layernorm(x.to(block.post_attention_layernorm.weight.dtype))
    gate, up = (proj.expand(latent(proj, h)) for proj in (mlp.gate_proj, mlp.up_proj))
    return latent(mlp.down_proj, mlp.combine(gate, up))


class _Run(Function):
    """One layer, forwards as ever; backwards by sub-layers, the last first."""

    @staticmethod
    def forward(ctx: Any, policy: Reversible, block: Block, x: Tensor, rotary: Rotary, *parameters: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def make(projection: LowRank, h: Tensor) -> Tensor:
            z = projection.latent(h)
            if not policy.float8:
                kept.append(z)
                return z
            packed = to_float8(z)
            kept.extend(packed)
            # What enters the stream must be what can be subtracted again.
            enters = projection is block.self_attn.o_proj or projection is block.mlp.down_proj
            return from_float8(*packed, z.dtype) if enters else z

        ctx.remember_attention, ctx.recall_attention = nullcontext(), nullcontext()
        if policy.attention:
            ctx.remember_attention, ctx.recall_attention = create_selective_checkpoint_contexts(list(ATTENTION_OPS))
        z = attention_latent(block, x, rotary, make, ctx.remember_attention)
        ctx.latent_dtype = z.dtype
        x = x + block.self_attn.o_proj.expand(z)
        z = mlp_latent(block, x, make)
        x = x + block.mlp.down_proj.expand(z)
        ctx.save_for_backward(*kept)
        ctx.block, ctx.rotary, ctx.stream, ctx.float8 = block, rotary, policy.stream, policy.float8
        ctx.stream.value = x
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block, rotary = ctx.block, ctx.rotary
        o_proj, down_proj = block.self_attn.o_proj, block.mlp.down_proj
        saved = iter(ctx.saved_tensors)
        latents = [from_float8(q, next(saved), ctx.latent_dtype) if ctx.float8 else q for q in saved]
        grads: dict[Tensor, Tensor] = {}
        # Modules are given views: hooks that wait for the gradients of a module's inputs cannot watch a leaf of a
        # backward pass inside this one.
        x = ctx.stream.value.detach()
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            # Latents by number: 0 q, 1 k, 2 v, 3 o, 4 gate, 5 up, 6 down. In the forward pass, x1 = x0 + o(z3) and
            # x2 = x1 + down(z6). So first x1 = x2 - down(z6), which also gives the gradients of z6 and down's B.
            x, grad_latent = invert_residual_add(down_proj, latents[6], x, grad, grads)
            # Then from x1 up to z6 again, and back: what the MLP adds to the gradient of x1.
            z = mlp_latent(block, x.view_as(x), replay(latents[4:]))
            grad = grad + sublayer_grad(
                z, grad_latent, x, (block.post_attention_layernorm, block.mlp), down_proj, grads
            )
            # The same for attention: x0 = x1 - o(z3), then from x0 up to z3 again, and back.
            x, grad_latent = invert_residual_add(o_proj, latents[3], x.detach(), grad, grads)
            z = attention_latent(block, x.view_as(x), rotary, replay(latents[:4]), ctx.recall_attention)
            grad = grad + sublayer_grad(z, grad_latent, x, (block.input_layernorm, block.self_attn), o_proj, grads)
        ctx.stream.value = x.detach()
        return None, None, grad, None, *(grads.get(weight) for weight in weights_of(block))


def weights_of(module: nn.Module) -> list[Tensor]:
    """What the leaves compute with. While FSDP computes, that is no registered parameter but a view of its own."""
    return [leaf.weight for leaf in module.modules() if isinstance(getattr(leaf, "weight", None), Tensor)]


def invert_residual_add(
    projection: LowRank, latent: Tensor, x: Tensor, grad: Tensor, grads: dict
) -> tuple[Tensor, Tensor]:
    """Take ``expand(latent)`` off the stream again: the stream before it, as a leaf, and the latent's gradient."""
    latent = latent.detach().requires_grad_()
    added = projection.expand(latent.view_as(latent))  # a view: see below
    weights = weights_of(projection.B)
    grad_latent, *found = torch.autograd.grad(added, [latent, *weights], grad.to(added.dtype))
    grads.update(zip(weights, found, strict=True))
    return (x - added.detach()).requires_grad_(), grad_latent


def sublayer_grad(z: Tensor, grad_z: Tensor, x: Tensor, modules: tuple, last: LowRank, grads: dict) -> Tensor:
    """Gradient with respect to the stream ``x`` of a sub-layer that ends in the latent ``z`` of ``last``."""
    done = set(weights_of(last.B))
    weights = [weight for module in modules for weight in weights_of(module) if weight not in done]
    grad_x, *found = torch.autograd.grad(z, [x, *weights], grad_z)
    grads.update(zip(weights, found, strict=True))
    return grad_x


def replay(latents: list[Tensor]) -> MakeLatent:
    remembered: Iterator[Tensor] = iter(latents)
    return lambda projection, x: LinearWithKnownOutput.apply(x, projection.A.weight, next(remembered))


class LinearWithKnownOutput(Function):
    """A linear map whose output is known: nothing to compute forwards, its gradients backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype)
        grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)
        return grad_x, grad_weight.to(weight.dtype), None


FLOAT8 = torch.float8_e4m3fn


def to_float8(z: Tensor) -> tuple[Tensor, Tensor]:
    """(…, R) to 8 bits, and a float32 scale (…, 1) that makes each row's largest entry the largest number there is."""
    scale = z.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(FLOAT8).max
    return (z / scale).to(FLOAT8), scale


def from_float8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers (…, R) that :func:`to_float8` kept."""
    return (q.float() * scale).to(dtype)
