"""CR-Net, cross-layer low-rank residual network (arXiv 2509.18993), and its own way to do without activations.

Every projection adds something of low rank to the output of the same projection in the layer before. So that output can
be had back from its successor: ``Y_{l-1} = (Y_l - B A x) / s``, and from the last layer downwards all of them, from the
layers' inputs and the narrow latents ``A x`` alone.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cola_lightning.errors import InputError
from cola_lightning.methods.cola_m.reversible import LinearWithKnownOutput, weights_of
from cola_lightning.methods.low_rank import check_rank
from cola_lightning.models.activation_checkpointing import set_recompute
from cola_lightning.models.cross_layer import CrossLayerBlock, CrossLayerState
from cola_lightning.models.layers import NormalLinear, Scalar
from cola_lightning.models.llama import Llama
from cola_lightning.models.loss import at_least_float32
from cola_lightning.models.projection import CrossLayer, FullRank, Projection
from cola_lightning.models.rotary import Rotary

EPSILON = 1e-6


class CRNet(CrossLayer):
    """``Y_l = s(β) Y_{l-1} + B A x`` with ``s(β) = sign(β) (|β| + 1e-6)``, β a learned number for each projection and
    layer; in the first layer one dense matrix. Y is the raw output, before any rotary angle or nonlinearity.

    The paper's starting values of β, A and B were not at hand; both choices here are ours.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Width R of the bottleneck, between 1 and the smaller side.
        beta: Where β starts.
        start: ``zero`` starts B at zero, so that all layers begin with the first one's output times powers of β;
            ``normal`` starts both factors as plain low rank does.

    Raises:
        InputError: If the rank is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        beta: float = 1.0,
        start: Literal["zero", "normal"] = "zero",
    ) -> None:
        super().__init__()
        check_rank(in_features, out_features, rank)
        self.rank = rank
        std = (rank * (in_features + out_features)) ** -0.25
        self.A = NormalLinear(in_features, rank, std)
        self.B = NormalLinear(rank, out_features, 0.0 if start == "zero" else std)
        self.beta = Scalar(beta)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.join(self.A(x), received)

    def join(self, z: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:
        """From the latent (…, R) and the output before: the output, and the same as it is passed on, which stays in
        float32 where it was received so."""
        added = self.B(z)
        y = self.scale() * received + added
        return y.to(added.dtype), y

    def scale(self) -> Tensor:
        beta = self.beta.weight
        return torch.where(beta < 0, beta - EPSILON, beta + EPSILON)  # never 0, not even at β = 0

    def in_first_layer(self) -> Projection:
        return FirstOfCRNet(self.in_features, self.out_features)


class FirstOfCRNet(FullRank, CrossLayer):
    """A dense matrix that passes its output on."""

    def forward(self, x: Tensor, received: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, y


class Recompute:
    """Keep of each layer its input and seven latents, and of every ``anchor_every``-th, from the last one down, its
    seven outputs. Backwards, the outputs of the others are recovered from those above; of the projections only the
    up-projections are done again, and attention. The outputs are passed on and recovered in float32: each recovery
    divides the error that it inherits by ``s``.
    """

    def __init__(self, anchor_every: int) -> None:
        self.anchor_every = anchor_every
        self.recovered: list[Tensor] = []  # outputs of the layer below the one last run backwards

    def attach(self, network: Llama) -> None:
        """Make every layer of ``network`` run through this scheme in training."""
        blocks = list(network.model.layers)
        self.anchors = set(blocks[:: -self.anchor_every])
        for block in blocks:
            for part in (block.self_attn, block.mlp):
                for name, projection in part.named_children():
                    if not isinstance(projection, CRNet | FirstOfCRNet):
                        raise InputError(
                            f"CRNetRecompute recovers CR-Net's outputs, but {name} is {type(projection).__name__}; "
                            f"set --model.projection CRNet, or take the CoLAM callback"
                        )
            set_recompute(block, self)

    # Not traced: what happens in backward below is no graph that torch.compile could hold.
    @torch.compiler.disable
    def __call__(self, block: CrossLayerBlock, x: Tensor, rotary: Rotary, *received: Tensor) -> tuple[Tensor, ...]:
        return _Run.apply(self, block, rotary, len(received), x, *received, *weights_of(block))


class _Keep(CrossLayerState):
    """Calls of the forward pass: compute as without recomputing, note each latent, pass outputs on in float32."""

    def __init__(self, received: tuple[Tensor, ...]) -> None:
        super().__init__(received)
        self.latents: list[Tensor] = []

    def __call__(self, projection: Projection, x: Tensor) -> Tensor:
        if isinstance(projection, CRNet):
            z = projection.A(x)
            self.latents.append(z)
            y, passed_on = projection.join(z, self.received[len(self.passed_on)])
        else:
            y, passed_on = projection(x, None)
        self.passed_on.append(at_least_float32(passed_on))
        return y


class _Recover(CrossLayerState):
    """Calls of the backward pass: from this layer's latents and outputs to the outputs of the layer below, as leaves
    of a graph."""

    def __init__(self, latents: list[Tensor], outputs: list[Tensor]) -> None:
        super().__init__()
        self.latents, self.outputs = latents, outputs
        self.below: list[Tensor] = []

    def __call__(self, projection: Projection, x: Tensor) -> Tensor:
        number = len(self.passed_on)
        known = self.outputs[number]
        if not isinstance(projection, CRNet):
            y = LinearWithKnownOutput.apply(x, projection.weight, known.to(x.dtype))
            self.passed_on.append(at_least_float32(y))
            return y
        # Y_l = s Y_{l-1} + B z with Y_l and z known. First Y_{l-1} = (Y_l - B z) / s, without a graph; then Y_l again
        # from it, with one, so that gradients reach Y_{l-1}, s, B, and through z also A and x.
        added = projection.B(LinearWithKnownOutput.apply(x, projection.A.weight, self.latents[number]))
        scale = projection.scale()
        below = ((known - added.detach()) / scale.detach()).requires_grad_()
        self.below.append(below)
        y = scale * below + added
        self.passed_on.append(y)
        return y.to(added.dtype)


class _Run(Function):
    """Run one layer without a graph; in the backward pass rebuild its graph from what was kept, and go through it."""

    @staticmethod
    def forward(
        ctx: Any, policy: Recompute, block: CrossLayerBlock, rotary: Rotary, count: int, x: Tensor, *rest: Tensor
    ) -> Any:
        ctx.set_materialize_grads(False)
        state = _Keep(rest[:count])
        out = block.run(x, rotary, state)
        anchored = state.passed_on if block in policy.anchors else []
        ctx.save_for_backward(x, *state.latents, *anchored)
        ctx.policy, ctx.block, ctx.rotary, ctx.count, ctx.latents = policy, block, rotary, count, len(state.latents)
        device = x.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        return (out, *state.passed_on)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        policy, block = ctx.policy, ctx.block
        x, *kept = (tensor.detach() for tensor in ctx.saved_tensors)  # the anchors are this node's own outputs
        # An anchor kept its outputs. Any other layer's were recovered by the layer above, which just ran.
        latents, outputs = kept[: ctx.latents], kept[ctx.latents :] or policy.recovered
        weights = weights_of(block)
        x.requires_grad_()
        state = _Recover(latents, outputs)
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            # A view: hooks that wait for the gradients of a module's inputs cannot watch a leaf of a backward pass
            # inside this one.
            out = block.run(x.view_as(x), ctx.rotary, state)
        # Backwards through the stream and the seven outputs. Where nothing asks for one of them, it has no gradient.
        pairs = [(y, g) for y, g in zip([out, *state.passed_on], grads, strict=True) if g is not None]
        ends, starts = zip(*pairs, strict=True)
        found = torch.autograd.grad(ends, [x, *state.below, *weights], starts, allow_unused=True)
        policy.recovered = [below.detach() for below in state.below]
        return None, None, None, None, *found
