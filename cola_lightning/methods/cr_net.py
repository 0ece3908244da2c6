"""CR-Net, the cross-layer low-rank residual network (arXiv 2509.18993), and its activation checkpointing.

Every projection adds a low-rank term to the output of the same projection in the layer before:
``Y_l = s Y_{l-1} + B A x``. The equation can be solved for the earlier output: ``Y_{l-1} = (Y_l - B A x) / s``. So
:class:`CRNetRecompute` keeps only the layers' inputs and the narrow latents ``A x``, and recovers all outputs from the
last layer down to the first.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cola_lightning.errors import InputError, check_at_least
from cola_lightning.light_import import not_compiled
from cola_lightning.methods.arguments import check_choice, check_rank
from cola_lightning.methods.recompute_callback import RecomputeCallback
from cola_lightning.models.activation_checkpointing import (
    LinearWithKnownOutput,
    autocast_settings,
    set_recompute,
    weights_of,
)
from cola_lightning.models.cross_layer import CrossLayerBlock, CrossLayerState
from cola_lightning.models.initialization import low_rank_std
from cola_lightning.models.layers import NormalLinear, Scalar
from cola_lightning.models.llama import Llama
from cola_lightning.models.loss import at_least_float32
from cola_lightning.models.projection import CrossLayer, FullRank, Projection
from cola_lightning.models.rotary import Rotary

EPSILON = 1e-6


class CRNet(CrossLayer):
    """``Y_l = s(β) Y_{l-1} + B A x`` with ``s(β) = sign(β) (|β| + 1e-6)``, β a learned number for each projection and
    layer; in the first layer one dense matrix. Y is the raw output, before any rotary angle or nonlinearity.

    The paper's initial values of β, A and B were not available; those here are ours.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Width R of the bottleneck, between 1 and the smaller side.
        beta: Initial value of β.
        start: ``zero`` initializes B with zero, so that every layer begins with the first layer's output times a
            power of β. ``normal`` initializes both factors as plain low rank does.

    Raises:
        InputError: If the rank is out of range, or ``start`` is neither.
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
        check_choice("CRNet", "start", start, "zero", "normal")
        self.rank = rank
        std = low_rank_std(in_features, out_features, rank)
        self.A = NormalLinear(in_features, rank, std)
        self.B = NormalLinear(rank, out_features, 0.0 if start == "zero" else std)
        self.beta = Scalar(beta)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.join(self.A(x), received)

    def join(self, z: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the output from the latent (…, R) and the output of the layer before.

        Returns:
            The output in the dtype of the low-rank term; and the output to pass on, which stays in float32 if the
            received one is.
        """
        added = self.B(z)
        y = self.scale() * received + added
        return y.to(added.dtype), y

    def scale(self) -> Tensor:
        """Compute s(β), which is never 0, not even at β = 0."""
        beta = self.beta.weight
        return torch.where(beta < 0, beta - EPSILON, beta + EPSILON)

    def in_first_layer(self) -> Projection:
        return FirstOfCRNet(self.in_features, self.out_features)


class FirstOfCRNet(FullRank, CrossLayer):
    """The dense matrix of the first layer, which passes its output on."""

    def forward(self, x: Tensor, received: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, y


class CRNetRecompute(RecomputeCallback):
    """Activation checkpointing for CR-Net: keep inputs and latents, recover the projections' outputs in backward.

    It changes neither parameters nor checkpoints, so a run can switch it on or off when it resumes. Validation is never
    checkpointed.

    Args:
        anchor_every: Keep the outputs of every so many layers, counted from the last one down. Each recovery divides
            the error that it inherits by s(β), so fewer layers between anchors are more accurate and take more memory.

    Raises:
        InputError: When the run starts, if a projection is not CR-Net's or CoLAM is in the list of callbacks too.
    """

    def __init__(self, anchor_every: int = 8) -> None:
        check_at_least(1, "CRNetRecompute: ", anchor_every=anchor_every)
        self.anchor_every = anchor_every

    def apply(self, network: Llama) -> None:
        Recompute(self.anchor_every).attach(network)


class Recompute:
    """The recompute scheme of :class:`CRNetRecompute`.

    It keeps of each layer the input and the seven latents, and of every ``anchor_every``-th layer also the seven
    outputs. In the backward pass the outputs of a layer that is no anchor are recovered from those of the layer above.
    Of the products only the up-projections and attention are computed again. Outputs are passed on and recovered in
    float32, because each recovery divides the error that it inherits by s.

    Example: 8 layers with ``anchor_every`` 3 have the anchors 7, 4 and 1. Layer 7 recovers the outputs of layer 6, and
    6 those of 5. Layer 4 kept its own.
    """

    def __init__(self, anchor_every: int) -> None:
        self.anchor_every = anchor_every
        self.recovered: list[Tensor] = []  # outputs of the layer below the one whose backward pass ran last

    def attach(self, network: Llama) -> None:
        """Make every layer of ``network`` recompute by this scheme in training."""
        blocks = list(network.blocks())
        self.anchors = set(blocks[:: -self.anchor_every])
        for block in blocks:
            for name, projection in block.projections():
                if not isinstance(projection, CRNet | FirstOfCRNet):
                    raise InputError(
                        f"CRNetRecompute recovers CR-Net's outputs, but {name} is {type(projection).__name__}; "
                        f"set --model.projection CRNet, or take the CoLAM callback"
                    )
            set_recompute(block, self)

    # torch.compile must not trace this, because the backward pass below builds a graph of its own.
    @not_compiled
    def __call__(self, block: CrossLayerBlock, x: Tensor, rotary: Rotary, *received: Tensor) -> tuple[Tensor, ...]:
        return _Run.apply(self, block, rotary, len(received), x, *received, *weights_of(block))


class _Keep(CrossLayerState):
    """Projections of the forward pass: compute as usual, note each latent, pass outputs on in float32."""

    def __init__(self, received: tuple[Tensor, ...]) -> None:
        super().__init__(received)
        self.latents: list[Tensor] = []

    def __call__(self, projection: Projection, x: Tensor) -> Tensor:
        if isinstance(projection, CRNet):
            z = projection.A(x)
            self.latents.append(z)
            # Projections are called in one order in every layer, so the n-th takes the n-th tensor of the layer before.
            y, passed_on = projection.join(z, self.received[len(self.passed_on)])
        else:
            y, passed_on = projection(x, None)
        self.passed_on.append(at_least_float32(passed_on))
        return y


class _Recover(CrossLayerState):
    """Projections of the backward pass: recover the outputs of the layer below from this layer's latents and outputs.

    The recovered outputs are leaves of this layer's graph, so that they get gradients.
    """

    def __init__(self, latents: list[Tensor], outputs: list[Tensor]) -> None:
        super().__init__()
        self.latents, self.outputs = latents, outputs
        self.below: list[Tensor] = []

    def __call__(self, projection: Projection, x: Tensor) -> Tensor:
        number = len(self.passed_on)
        known = self.outputs[number]
        if isinstance(projection, FirstOfCRNet):  # there is no layer below
            y = LinearWithKnownOutput.apply(x, projection.weight, known.to(x.dtype))
            self.passed_on.append(at_least_float32(y))
            return y
        assert isinstance(projection, CRNet)
        # Y_l = s Y_{l-1} + B z, with Y_l and z known. First recover Y_{l-1} = (Y_l - B z) / s without a graph.
        added = projection.B(LinearWithKnownOutput.apply(x, projection.A.weight, self.latents[number]))
        scale = projection.scale()
        below = ((known - added.detach()) / scale.detach()).requires_grad_()
        self.below.append(below)
        # Then compute Y_l from it with a graph, so that gradients reach Y_{l-1}, s, B, and through z also A and x.
        y = scale * below + added
        self.passed_on.append(y)
        return y.to(added.dtype)


class _Run(Function):
    """Run one layer without a graph. In the backward pass, rebuild the graph from what was kept and go through it."""

    @staticmethod
    def forward(
        ctx: Any, scheme: Recompute, block: CrossLayerBlock, rotary: Rotary, count: int, x: Tensor, *rest: Tensor
    ) -> Any:
        # ``rest`` is the ``count`` tensors received, then the weights, which are here only to get their gradients.
        # What the last layer passes on is used by nobody. Its gradients come as None rather than as zeros.
        ctx.set_materialize_grads(False)
        state = _Keep(rest[:count])
        out = block.run(x, rotary, state)
        # Keep the input and the latents, and of an anchor also the outputs. What was received is not kept: the backward
        # pass recovers it, as outputs of the layer before. This is what the scheme saves.
        anchored = state.passed_on if block in scheme.anchors else []
        ctx.save_for_backward(x, *state.latents, *anchored)
        ctx.scheme, ctx.block, ctx.rotary, ctx.count, ctx.latents = scheme, block, rotary, count, len(state.latents)
        ctx.autocast = autocast_settings(x.device.type)
        return (out, *state.passed_on)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scheme, block = ctx.scheme, ctx.block
        x, *kept = (tensor.detach() for tensor in ctx.saved_tensors)  # detached: anchors are outputs of this node
        # 1. Take the outputs: an anchor kept them, for another layer the layer above has just recovered them.
        latents, outputs = kept[: ctx.latents], kept[ctx.latents :] or scheme.recovered
        # 2. Rebuild the layer's graph, which recovers the outputs of the layer below on the way.
        weights = weights_of(block)
        x.requires_grad_()
        state = _Recover(latents, outputs)
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            # The module gets a view of x, because hooks that wait for the gradients of a module's inputs cannot watch a
            # leaf of a backward pass inside this one.
            out = block.run(x.view_as(x), ctx.rotary, state)
        # 3. Go backward from the stream and the seven outputs, leaving out those without a gradient. ``below`` has the
        #    values of what forward received, so its gradients are those of the tensors received.
        pairs = [(y, g) for y, g in zip([out, *state.passed_on], grads, strict=True) if g is not None]
        ends, starts = zip(*pairs, strict=True)
        found = torch.autograd.grad(ends, [x, *state.below, *weights], starts, allow_unused=True)
        # 4. Leave the recovered outputs for the layer below, whose backward pass is next.
        scheme.recovered = [below.detach() for below in state.below]
        # One for each argument of forward: scheme, block, rotary and count have none, then x, received, weights.
        return None, None, None, None, *found
