"""The one decoder of this code base: LLaMA (RMSNorm, rotary positions, grouped-query attention, gated MLP).

Shape legend, used throughout the package: B batch, T tokens, D hidden size, F intermediate size, R rank,
V vocabulary, H attention heads (K key/value heads), E = D / H head dimension.

Parameter names are those of Hugging Face's ``LlamaForCausalLM``, so its weights load without renaming.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from cola_lightning.errors import InputError
from cola_lightning.models.cache import Cache, LayerCache
from cola_lightning.models.layers import FullRank, Head, MakeProjection, Projection, Relay, TokenEmbedding
from cola_lightning.models.positions import Rotary, apart, rotary_table, rotate
from cola_lightning.models.rope_scaling import Scaling, check_scaling

Call = Callable[[Sequence[Projection], Tensor], Sequence[Tensor]]
"""``f(projections, x)`` are the outputs of projections that share the input ``x``."""


LARGEST_SIZE = 10**9
"""The most layers, rows, columns or positions that a network may be asked for; products of two still fit 64 bits."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions; (B, T, D) -> (B, T, D)."""

    def __init__(self, hidden_size: int, num_heads: int, num_key_value_heads: int, projection: MakeProjection) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.num_key_value_heads = num_key_value_heads
        self.grouped = num_key_value_heads != num_heads
        key_value_size = num_key_value_heads * self.head_dim
        self.q_proj = projection(hidden_size, hidden_size)
        self.k_proj = projection(hidden_size, key_value_size)
        self.v_proj = projection(hidden_size, key_value_size)
        self.o_proj = projection(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotary: Rotary, call: Call) -> Tensor:
        q, k, v = call((self.q_proj, self.k_proj, self.v_proj), x)
        (y,) = call((self.o_proj,), self.mix(q, k, v, rotary))
        return y

    def mix(self, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
        """Attention itself: q (B, T, D), k and v (B, T, K * E) -> (B, T, D)."""
        q, k, v = rotate(self._heads(q), rotary), rotate(self._heads(k), rotary), self._heads(v)
        if rotary.cache is not None:
            k, v = rotary.cache.extend(k, v)
        # No mask in training: rows are padded on the right and padding is not in the loss, so causality alone gives the
        # same loss and leaves the fast kernels open. A single token, with all that it may attend to, needs neither.
        causal = rotary.mask is None and q.shape[2] > 1
        y = scaled_dot_product_attention(q, k, v, rotary.mask, is_causal=causal, enable_gqa=self.grouped)
        return y.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * E) -> (B, heads, T, E)"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """Gated MLP; (B, T, D) -> (B, T, D): ``down(silu(gate(x)) * up(x))``, or without the SiLU where the projection
    brings its own nonlinearity (CoLA from 350M up, see :class:`Llama`)."""

    def __init__(self, hidden_size: int, intermediate_size: int, gate_silu: bool, projection: MakeProjection) -> None:
        super().__init__()
        self.gate_silu = gate_silu
        self.intermediate_size = intermediate_size
        self.gate_proj = projection(hidden_size, intermediate_size)
        self.up_proj = projection(hidden_size, intermediate_size)
        self.down_proj = projection(intermediate_size, hidden_size)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        gate, up = call((self.gate_proj, self.up_proj), x)
        (y,) = call((self.down_proj,), self.combine(gate, up))
        return y

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """The gating itself, all (B, T, F)."""
        return (silu(gate) if self.gate_silu else gate) * up


class Block(nn.Module):
    """One decoder layer, pre-normalised; residual stream (B, T, D) -> (B, T, D). Where its projections are
    :class:`CrossLayer`, it takes what the layer before handed on, and returns the stream and what it hands on itself.

    ``checkpoint``, where it is set, runs the layer in training in place of a plain call: it is the seam by which an
    activation-checkpointing policy enters without a wrapper module, so that parameter names stay as they are.
    ``fused`` makes one product, in training, of the matrices of projections that share their input.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_key_value_heads: int,
        rms_norm_eps: float,
        gate_silu: bool,
        projection: MakeProjection,
        fused: bool,
    ) -> None:
        super().__init__()
        self.fused = fused
        self.input_layernorm = nn.RMSNorm(hidden_size, rms_norm_eps)
        self.self_attn = Attention(hidden_size, num_heads, num_key_value_heads, projection)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, rms_norm_eps)
        self.mlp = MLP(hidden_size, intermediate_size, gate_silu, projection)
        self.checkpoint: Callable[..., Tensor | tuple[Tensor, ...]] | None = None

    def forward(self, x: Tensor, rotary: Rotary, *received: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.checkpoint is not None and torch.is_grad_enabled():
            return self.checkpoint(self, x, rotary, *received)
        return self.body(x, rotary, *received)

    def body(self, x: Tensor, rotary: Rotary, *received: Tensor) -> Tensor | tuple[Tensor, ...]:
        # To join matrices costs a copy of them: little beside a training step's products, much beside a single token's.
        relay = Relay(received, self.fused and torch.is_grad_enabled())
        x = self.run(x, rotary, relay)
        return (x, *relay.handed_on) if relay.handed_on else x

    def run(self, x: Tensor, rotary: Rotary, call: Call) -> Tensor:
        """The layer itself, its projections called by ``call``."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, call)
        return x + self.mlp(self.post_attention_layernorm(x), call)


def through(
    layers: Iterable[nn.Module], x: Tensor, rotary: Rotary, caches: Sequence[LayerCache] | None = None
) -> Tensor:
    """The residual stream after these layers, each handed what the one before handed on; in generation each with what
    it has seen."""
    received: tuple[Tensor, ...] = ()
    for index, layer in enumerate(layers):
        out = layer(x, rotary if caches is None else rotary._replace(cache=caches[index]), *received)
        x, *received = out if isinstance(out, tuple) else (out,)
    return x


class Decoder(nn.Module):
    """Embedding, layers and final norm; token ids (B, T) -> hidden states (B, T, D)."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_hidden_layers: int,
        pad_token_id: int | None,
        head_dim: int,
        rope_theta: float,
        rope_scaling: Scaling | None,
        rms_norm_eps: float,
        make_block: Callable[[int], Block],
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.rope_scaling = None if rope_scaling is None else check_scaling(rope_scaling, head_dim)
        self.embed_tokens = TokenEmbedding(vocab_size, hidden_size, pad_token_id)
        self.layers = nn.ModuleList(make_block(index) for index in range(num_hidden_layers))
        self.norm = nn.RMSNorm(hidden_size, rms_norm_eps)

    def forward(self, ids: Tensor, document_ids: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = self.embed_tokens(ids)
        seen = 0 if cache is None else cache.length
        if seen and ids.shape[1] > 1 and document_ids is None:
            document_ids = ids.new_zeros(1, seen + ids.shape[1])  # all one document
        rotary = rotary_table(
            ids.shape[1], self.head_dim, self.rope_theta, like=x, start=seen, scaling=self.rope_scaling
        )
        if document_ids is not None:
            rotary = rotary._replace(mask=apart(document_ids, seen))
        x = through(self.layers, x, rotary, None if cache is None else cache.layers)
        return self.norm(x.to(self.norm.weight.dtype))  # a checkpointing policy may run the stream in float32


class Llama(nn.Module):
    """LLaMA with an untied head; token ids (B, T) int64 -> logits (B, T, V).

    Args:
        vocab_size: Rows of the embedding and of the head (V).
        hidden_size: Width of the residual stream (D).
        intermediate_size: Width inside the MLP (F).
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Query heads (H); must divide ``hidden_size`` into even parts.
        num_key_value_heads: Key and value heads (K), a divisor of H; H itself if not given.
        max_position_embeddings: Longest sequence that is accepted, in tokens.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: How they are stretched to longer texts, by Hugging Face's names; see
            :mod:`cola_lightning.models.rope_scaling`. None for not at all.
        rms_norm_eps: Epsilon inside RMSNorm.
        gate_silu: Keep LLaMA's SiLU on the MLP's gate. Full rank needs it. The CoLA paper keeps it beside the latent
            nonlinearity at 60M and 130M and drops it from 350M up (arXiv 2502.10940, ablation of σ's place).
        pad_token_id: Id whose embedding stays zero; None for no such row.
        projection: Makes each of the seven projections of a layer from (in_features, out_features).
        fused_projections: Make one product of the matrices of q, k and v, and of gate and up, which share their input.
            Parameters keep their names.
        loss_chunk_size: Tokens whose logits exist at a time in training; see :class:`Head`.

    Raises:
        InputError: Where the sizes do not fit together; the message names the value and the fix.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 2048,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-6,
        gate_silu: bool = True,
        pad_token_id: int | None = 0,
        projection: MakeProjection = FullRank,
        fused_projections: bool = False,
        loss_chunk_size: int | None = None,
        rope_scaling: Scaling | None = None,
    ) -> None:
        super().__init__()
        key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        sizes = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": key_value_heads,
            "max_position_embeddings": max_position_embeddings,
        }
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
            if value > LARGEST_SIZE:
                raise InputError(f"{name} is {value}; {LARGEST_SIZE:,} is the most")
        if hidden_size % num_attention_heads:
            raise InputError(
                f"num_attention_heads {num_attention_heads} does not divide hidden_size {hidden_size}; "
                f"choose a divisor, for instance {_nearest_divisor(hidden_size, num_attention_heads)}"
            )
        if not 1 < rope_theta < math.inf:
            raise InputError(f"rope_theta is {rope_theta}; it must be a number above 1, for instance 10000")
        if not 0 <= rms_norm_eps < math.inf:
            raise InputError(f"rms_norm_eps is {rms_norm_eps}; it must be a number of at least 0, for instance 1e-6")
        head_dim = hidden_size // num_attention_heads
        if head_dim % 2:
            raise InputError(
                f"hidden_size {hidden_size} / num_attention_heads {num_attention_heads} gives heads of {head_dim}, but "
                f"rotary positions need an even head dimension; change one of the two"
            )
        if num_attention_heads % key_value_heads:
            raise InputError(
                f"num_key_value_heads {key_value_heads} does not divide num_attention_heads {num_attention_heads}; "
                f"choose a divisor, for instance {_nearest_divisor(num_attention_heads, key_value_heads)}"
            )
        if pad_token_id is not None and not 0 <= pad_token_id < vocab_size:
            raise InputError(
                f"pad_token_id {pad_token_id} is not one of the {vocab_size} ids of the vocabulary; "
                f"name one below {vocab_size}, or none at all"
            )
        self.max_position_embeddings = max_position_embeddings
        self.model = Decoder(
            vocab_size,
            hidden_size,
            num_hidden_layers,
            pad_token_id,
            head_dim,
            rope_theta,
            rope_scaling,
            rms_norm_eps,
            lambda index: Block(
                hidden_size,
                intermediate_size,
                num_attention_heads,
                key_value_heads,
                rms_norm_eps,
                gate_silu,
                projection if index else lambda in_, out: projection(in_, out).in_first_layer(),
                fused_projections,
            ),
        )
        self.lm_head = Head(hidden_size, vocab_size, loss_chunk_size)

    def forward(
        self,
        ids: Tensor,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        *,
        targets: Tensor | None = None,
        reduction: Literal["none", "sum"] = "none",
        last_only: bool = False,
    ) -> Tensor:
        """``document_ids`` (B, T) number the documents of each row, where attention is to keep to its own. With a
        ``cache``, ids are those that follow what it holds, and ``document_ids`` number both. With ``targets`` (B, T),
        the ids that should follow, the result is losses in place of logits, as from :class:`Head`. With ``last_only``
        it is the logits of each row's last token, (B, 1, V), all that generation asks of a prompt."""
        length = ids.shape[1] + (0 if cache is None else cache.length)
        if length > self.max_position_embeddings:
            raise InputError(
                f"a sequence of {length} tokens is beyond max_position_embeddings "
                f"{self.max_position_embeddings}; shorten it or raise max_position_embeddings"
            )
        hidden = self.model(ids, document_ids, cache)
        if last_only:
            hidden = hidden[:, -1:]
        return self.lm_head(hidden) if targets is None else self.lm_head(hidden, targets, reduction)


def _nearest_divisor(n: int, wanted: int) -> int:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return min(sorted([*small, *(n // d for d in small)]), key=lambda d: abs(d - wanted))
