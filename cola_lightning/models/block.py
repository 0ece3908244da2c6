"""One decoder layer of LLaMA: attention, gated MLP, and the residual stream around them.

Shape legend, used throughout the package: B batch, T tokens, D hidden size, F intermediate size, R rank,
V vocabulary, H attention heads (K key/value heads), E = D / H head dimension.

This is the whole layer as most methods train it. Three files extend it by subclasses, none of which renames a
parameter:

- :mod:`~cola_lightning.models.fused`: one product for projections that share an input.
- :mod:`~cola_lightning.models.cross_layer`: tensors that pass from a layer's projections to the next layer's.
- :mod:`~cola_lightning.models.activation_checkpointing`: layers that are computed again in the backward pass.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from cola_lightning.models.attention import Attention
from cola_lightning.models.config import LlamaConfig
from cola_lightning.models.mlp import MLP
from cola_lightning.models.projection import Projection
from cola_lightning.models.rotary import Rotary


class Block(nn.Module):
    """One decoder layer, pre-normalized; residual stream (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig, attention: Attention, mlp: MLP) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        return x + self.mlp(self.post_attention_layernorm(x))

    def projections(self) -> Iterator[tuple[str, Projection]]:
        """Yield the seven projections with their names, as the forward pass calls them: q, k, v, o, gate, up, down."""
        for part in (self.self_attn, self.mlp):
            for name, module in part.named_children():
                assert isinstance(module, Projection), f"{name} is {type(module).__name__}"
                yield name, module
