"""CoLA-M without the residual stream: reconstruct a layer's input from its output and its latents.

A sub-layer adds to the stream: ``x' = x + expand(z)``. If z is kept, its input is ``x = x' - expand(z)``. So the
backward pass reconstructs the stream from the last layer down, and only the seven R-wide latents of each layer are
kept: 1.75 D numbers per token at R = D / 4, instead of 2.75 D with the layer's input. In return the up-projection of
down is computed again too. The stream is float32, so that subtracting gives back what was added.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from cola_lightning.errors import InputError
from cola_lightning.light_import import not_compiled
from cola_lightning.methods.low_rank import LowRank
from cola_lightning.models.activation_checkpointing import (
    LinearWithKnownOutput,
    autocast_settings,
    set_recompute,
    weights_of,
)
from cola_lightning.models.block import Block
from cola_lightning.models.llama import Llama
from cola_lightning.models.loss import at_least_float32
from cola_lightning.models.rotary import Rotary
from cola_lightning.private_apis.torch import ATTENTION_OPS

MakeLatent = Callable[[LowRank, Tensor], Tensor]
"""``f(projection, x)`` returns the latent (B, T, R) of ``projection`` for its input ``x``, computed or replayed."""


class Stream:
    """The residual stream (B, T, D) at the layer that runs now, first in the forward and then in the backward pass."""

    value: Tensor


class Reversible:
    """The recompute scheme that keeps a layer's latents only.

    Args:
        float8: Keep them in 8 bits (e4m3) with a scale for each token.
        attention: Keep the attention's output and its log-sum-exp, so that attention is not computed again.
    """

    def __init__(self, float8: bool, attention: bool) -> None:
        self.float8, self.attention = float8, attention

    def attach(self, network: Llama) -> None:
        """Make every layer of ``network`` recompute by this scheme in training."""
        blocks = list(network.blocks())
        self.first = blocks[0]
        for block in blocks:
            set_recompute(block, self)

    # torch.compile must not trace this, because the backward pass below builds graphs of its own.
    @not_compiled
    def __call__(self, block: Block, x: Tensor, rotary: Rotary) -> Tensor:
        if block is self.first:
            self.stream = Stream()  # one for each forward pass, because several may run before the first backward
        elif x.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"CoLAM with keep: latents needs a float32 residual stream, but the strategy casts it to {x.dtype} "
                f"between layers; set keep: residual_and_latents, or let the strategy leave the layers' inputs alone"
            )
        return _Run.apply(self, block, at_least_float32(x), rotary, *weights_of(block))


def low_rank_projections(block: Block) -> list[LowRank]:
    """List q, k, v, o, gate, up and down of a layer; CoLAM has checked that they are low-rank."""
    return [projection for _, projection in block.projections() if isinstance(projection, LowRank)]


def attention_latent(block: Block, x: Tensor, rotary: Rotary, latent: MakeLatent, mix_context: Any) -> Tensor:
    """Compute the latent of the o-projection (B, T, R) from the layer's input (B, T, D)."""
    q_proj, k_proj, v_proj, o_proj, *_ = low_rank_projections(block)
    h = block.input_layernorm(x.to(block.input_layernorm.weight.dtype))
    q, k, v = (projection.expand(latent(projection, h)) for projection in (q_proj, k_proj, v_proj))
    with mix_context:
        y = block.self_attn.mix(q, k, v, rotary)
    return latent(o_proj, y)


def mlp_latent(block: Block, x: Tensor, latent: MakeLatent) -> Tensor:
    """Compute the latent of the down-projection (B, T, R) from the stream after attention (B, T, D)."""
    *_, gate_proj, up_proj, down_proj = low_rank_projections(block)
    h = block.post_attention_layernorm(x.to(block.post_attention_layernorm.weight.dtype))
    gate, up = (projection.expand(latent(projection, h)) for projection in (gate_proj, up_proj))
    return latent(down_proj, block.mlp.combine(gate, up))


class _Run(Function):
    """Run one layer. Its backward pass goes through the sub-layers, the MLP first and then attention."""

    @staticmethod
    def forward(ctx: Any, scheme: Reversible, block: Block, x: Tensor, rotary: Rotary, *parameters: Tensor) -> Tensor:
        # The parameters are arguments only so that autograd takes their gradients from backward().
        kept: list[Tensor] = []
        o_proj, down_proj = low_rank_projections(block)[3::3]  # numbers 3 and 6 of q, k, v, o, gate, up, down

        def make(projection: LowRank, h: Tensor) -> Tensor:
            z = projection.latent(h)
            if not scheme.float8:
                kept.append(z)
                return z
            packed = to_float8(z)
            kept.extend(packed)
            # The latents of o and down enter the stream. They must be rounded in the forward pass too, because the
            # backward pass subtracts what the rounded ones expand to.
            enters_stream = projection is o_proj or projection is down_proj
            return from_float8(*packed, z.dtype) if enters_stream else z

        ctx.remember_attention, ctx.recall_attention = nullcontext(), nullcontext()
        if scheme.attention:
            ctx.remember_attention, ctx.recall_attention = create_selective_checkpoint_contexts(list(ATTENTION_OPS))
        # Attention, then the MLP, as in Block. ``make`` keeps the seven latents in the order of their projections.
        z = attention_latent(block, x, rotary, make, ctx.remember_attention)
        ctx.latent_dtype = z.dtype
        x = x + o_proj.expand(z)
        z = mlp_latent(block, x, make)
        x = x + down_proj.expand(z)
        ctx.save_for_backward(*kept)
        ctx.block, ctx.rotary, ctx.stream, ctx.float8 = block, rotary, scheme.stream, scheme.float8
        # All layers share one place for the stream, and each replaces the value. After the forward pass it is the last
        # layer's output, where the backward pass begins; no layer's input is kept.
        ctx.stream.value = x
        ctx.autocast = autocast_settings(x.device.type)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block, rotary = ctx.block, ctx.rotary
        o_proj, down_proj = low_rank_projections(block)[3::3]
        # In 8 bits the saved tensors alternate: a latent, then its scales, which next() takes from the same iterator.
        saved = iter(ctx.saved_tensors)
        latents = [from_float8(q, next(saved), ctx.latent_dtype) if ctx.float8 else q for q in saved]
        grads: dict[Tensor, Tensor] = {}
        # Modules get views (view_as), because hooks that wait for the gradients of a module's inputs cannot watch a
        # leaf of a backward pass inside this one.
        x = ctx.stream.value.detach()
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            # Latents by number: 0 q, 1 k, 2 v, 3 o, 4 gate, 5 up, 6 down. The forward pass was x1 = x0 + o(z3) and
            # x2 = x1 + down(z6), and the stream is at x2.
            # 1. Reconstruct x1 = x2 - down(z6). This also gives the gradients of z6 and of the factor B of down.
            x, grad_latent = invert_residual_add(down_proj, latents[6], x, grad, grads)
            # 2. Compute z6 from x1 again, with a graph, and go back through it: the MLP's share of the gradient of x1.
            z = mlp_latent(block, x.view_as(x), replay(latents[4:]))
            grad = grad + sublayer_grad(
                z, grad_latent, x, (block.post_attention_layernorm, block.mlp), down_proj, grads
            )
            # 3. Reconstruct x0 = x1 - o(z3).
            x, grad_latent = invert_residual_add(o_proj, latents[3], x.detach(), grad, grads)
            # 4. Compute z3 from x0 again, and go back through it.
            z = attention_latent(block, x.view_as(x), rotary, replay(latents[:4]), ctx.recall_attention)
            grad = grad + sublayer_grad(z, grad_latent, x, (block.input_layernorm, block.self_attn), o_proj, grads)
        # x is now this layer's input, which is the output of the layer below, whose backward pass is next.
        ctx.stream.value = x.detach()
        return None, None, grad, None, *(grads.get(weight) for weight in weights_of(block))


def invert_residual_add(
    projection: LowRank, latent: Tensor, x: Tensor, grad: Tensor, grads: dict
) -> tuple[Tensor, Tensor]:
    """Subtract ``expand(latent)`` from the stream ``x``; put the gradients of the projection's B into ``grads``.

    Returns:
        The stream before the addition, as a leaf, and the latent's gradient.
    """
    # expand(latent) is needed twice: its value, to subtract it, and its graph, for the gradients of latent and B. The
    # stream was x' = x + expand(latent), so the gradient of expand(latent) is that of x'.
    latent = latent.detach().requires_grad_()
    added = projection.expand(latent.view_as(latent))
    weights = weights_of(projection.B)
    grad_latent, *found = torch.autograd.grad(added, [latent, *weights], grad.to(added.dtype))
    grads.update(zip(weights, found, strict=True))
    return (x - added.detach()).requires_grad_(), grad_latent


def sublayer_grad(z: Tensor, grad_z: Tensor, x: Tensor, modules: tuple, last: LowRank, grads: dict) -> Tensor:
    """Compute the gradient of the stream ``x`` through a sub-layer that ends in the latent ``z`` of ``last``."""
    # B of ``last`` comes after z, and has its gradient from invert_residual_add. All other weights come before z.
    done = set(weights_of(last.B))
    weights = [weight for module in modules for weight in weights_of(module) if weight not in done]
    grad_x, *found = torch.autograd.grad(z, [x, *weights], grad_z)
    grads.update(zip(weights, found, strict=True))
    return grad_x


def replay(latents: list[Tensor]) -> MakeLatent:
    """Return the kept latents one after another, instead of computing them; gradients flow as if computed."""
    remembered: Iterator[Tensor] = iter(latents)
    return lambda projection, x: LinearWithKnownOutput.apply(x, projection.A.weight, next(remembered))


FLOAT8 = torch.float8_e4m3fn


def to_float8(z: Tensor) -> tuple[Tensor, Tensor]:
    """Round (…, R) to 8 bits; also return the float32 scales (…, 1), which map each row's largest entry to 448."""
    scale = z.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(FLOAT8).max
    return (z / scale).to(FLOAT8), scale


def from_float8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Restore (…, R) from what :func:`to_float8` returned."""
    return (q.float() * scale).to(dtype)
