"""One decoder layer of LLaMA: attention, gated MLP, and the residual stream around them.

Shape legend, used throughout the package: B batch, T tokens, D hidden size, F intermediate size, R rank,
V vocabulary, H attention heads (K key/value heads), E = D / H head dimension.

This is the whole layer as most methods train it. Three things stand beside it, in files of their own, and none of them
renames a parameter: projections that share an input and are multiplied together (:mod:`~cola_lightning.models.fused`),
tensors that go from a layer's projections to the next layer's (:mod:`~cola_lightning.models.cross_layer`), and layers
that are computed again in the backward pass (:mod:`~cola_lightning.models.recompute`).
"""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from cola_lightning.models.config import LlamaConfig
from cola_lightning.models.layers import MakeProjection
from cola_lightning.models.rotary import Rotary, rotate


class Attention(nn.Module):
    """Causal self-attention with rotary positions; (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig, projection: MakeProjection) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.key_value_heads != config.num_attention_heads
        key_value_size = config.key_value_heads * config.head_dim
        self.q_proj = projection(config.hidden_size, config.hidden_size)
        self.k_proj = projection(config.hidden_size, key_value_size)
        self.v_proj = projection(config.hidden_size, key_value_size)
        self.o_proj = projection(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, D), (B, T, K * E), (B, T, K * E)
        return self.o_proj(self.mix(q, k, v, rotary))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
        """Attend: q (B, T, D), k and v (B, T, K * E) -> (B, T, D)."""
        q, k, v = rotate(self._heads(q), rotary), rotate(self._heads(k), rotary), self._heads(v)
        if rotary.cache is not None:
            k, v = rotary.cache.extend(k, v)  # (B, K, tokens so far, E)
        # No mask in training: rows are padded on the right and padding is not in the loss, so causality alone gives the
        # same loss and leaves the fast kernels open. A single token, with all that it may attend to, needs neither.
        causal = rotary.mask is None and q.shape[2] > 1
        y = scaled_dot_product_attention(q, k, v, rotary.mask, is_causal=causal, enable_gqa=self.grouped)
        return y.transpose(1, 2).flatten(2)  # (B, H, T, E) -> (B, T, D)

    def _heads(self, x: Tensor) -> Tensor:
        """Split into heads, (B, T, heads * E) -> (B, heads, T, E)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """Gated MLP; (B, T, D) -> (B, T, D): ``down(silu(gate(x)) * up(x))``, or without the SiLU where the projection
    brings its own nonlinearity (CoLA from 350M up, see :class:`~cola_lightning.models.LlamaConfig`)."""

    def __init__(self, config: LlamaConfig, projection: MakeProjection) -> None:
        super().__init__()
        self.gate_silu = config.gate_silu
        self.gate_proj = projection(config.hidden_size, config.intermediate_size)
        self.up_proj = projection(config.hidden_size, config.intermediate_size)
        self.down_proj = projection(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.combine(self.gate_proj(x), self.up_proj(x)))

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply by the gate; all (B, T, F)."""
        return (silu(gate) if self.gate_silu else gate) * up


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
