"""Causal self-attention with rotary positions and grouped key and value heads."""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from cola_lightning.models.config import LlamaConfig
from cola_lightning.models.kv_cache import Slots
from cola_lightning.models.loss import at_least_float32
from cola_lightning.models.projection import MakeProjection
from cola_lightning.models.rotary import Rotary, rotate


class Attention(nn.Module):
    """Causal self-attention; (B, T, D) -> (B, T, D)."""

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
        q, k, v = rotate(self._split_heads(q), rotary), rotate(self._split_heads(k), rotary), self._split_heads(v)
        if rotary.cache is not None:
            k, v = rotary.cache.extend(k, v)  # (B, K, tokens so far, E)
        if isinstance(rotary.cache, Slots):  # one token in a compiled step
            return attend_to_all(q, k, v).transpose(1, 2).flatten(2)
        # Training needs no mask, because rows are padded on the right and padding is not in the loss: causality alone
        # gives the same loss and allows the fast kernels. A single token may attend to all tokens before it.
        causal = rotary.mask is None and q.shape[2] > 1
        y = scaled_dot_product_attention(q, k, v, rotary.mask, is_causal=causal, enable_gqa=self.grouped)
        return y.transpose(1, 2).flatten(2)  # (B, H, T, E) -> (B, T, D)

    def _split_heads(self, x: Tensor) -> Tensor:
        """Split into heads, (B, T, heads * E) -> (B, heads, T, E)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def attend_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one token to all before it and itself: q (B, H, 1, E), k and v (B, K, T, E) -> (B, H, 1, E)."""
    groups = q.shape[1] // k.shape[1]
    q = q.unflatten(1, (-1, groups))  # (B, K, H / K, 1, E)
    exact_q, exact_k, exact_v = map(at_least_float32, (q, k, v))
    weights = (exact_q * exact_k[:, :, None]).sum(-1) * q.shape[-1] ** -0.5  # (B, K, H / K, T)
    y = (weights.softmax(-1)[..., None] * exact_v[:, :, None]).sum(-2)  # (B, K, H / K, E)
    return y.to(v.dtype).flatten(1, 2)[:, :, None]
