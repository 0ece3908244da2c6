"""Decoder layers whose projections each take a tensor from their counterpart in the layer before (CR-Net, LaX).

Such a layer returns its residual stream and then one tensor for each of its projections, in the order in which they are
called: q, k, v, o, gate, up, down. The next layer takes them as further arguments. They pass through arguments and
results rather than through attributes of modules, so that checkpointing, ``torch.compile`` and sharding see them.
"""

from torch import Tensor

from cola_lightning.models.block import Block
from cola_lightning.models.projection import CrossLayer, Projection
from cola_lightning.models.rotary import Rotary


class CrossLayerState:
    """The tensors that one layer received, and those that it passes on to the next.

    Args:
        received: One for each projection of the layer before; empty in the first layer.
    """

    def __init__(self, received: tuple[Tensor, ...] = ()) -> None:
        self.received = received
        self.passed_on: list[Tensor] = []

    def __call__(self, projection: Projection, x: Tensor) -> Tensor:
        """Call a projection with its input (…, in) and the tensor of its counterpart; return its output (…, out)."""
        if not isinstance(projection, CrossLayer):
            return projection(x)
        # The n-th cross-layer projection of this layer takes the n-th tensor of the layer before.
        y, passed_on = projection(x, self.received[len(self.passed_on)] if self.received else None)
        self.passed_on.append(passed_on)
        return y


class CrossLayerBlock(Block):
    """A :class:`Block` with tensors from layer to layer.

    ``forward(x, rotary, *received)`` takes the stream (B, T, D) and what the layer before passed on, and returns the
    stream and what this layer passes on.
    """

    def forward(self, x: Tensor, rotary: Rotary, *received: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        state = CrossLayerState(received)
        return self.run(x, rotary, state), *state.passed_on

    def run(self, x: Tensor, rotary: Rotary, call: CrossLayerState) -> Tensor:
        """Compute the layer as Block does, but call each projection by ``call``."""
        attention, mlp = self.self_attn, self.mlp
        h = self.input_layernorm(x)
        q, k, v = call(attention.q_proj, h), call(attention.k_proj, h), call(attention.v_proj, h)
        x = x + call(attention.o_proj, attention.mix(q, k, v, rotary))
        h = self.post_attention_layernorm(x)
        gate, up = call(mlp.gate_proj, h), call(mlp.up_proj, h)
        return x + call(mlp.down_proj, mlp.combine(gate, up))
