"""LLaMA, the one decoder of this package: RMSNorm, rotary positions, grouped-query attention, gated MLP.

:mod:`cola_lightning.models.block` has the layer and the legend of tensor shapes. Parameter names are those of Hugging
Face's ``LlamaForCausalLM``, so its weights load without renaming.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from cola_lightning.errors import InputError
from cola_lightning.models.attention import Attention
from cola_lightning.models.block import Block
from cola_lightning.models.config import LlamaConfig
from cola_lightning.models.cross_layer import CrossLayerBlock
from cola_lightning.models.fused import FusedAttention, FusedMLP
from cola_lightning.models.kv_cache import Cache, KeyValueStore
from cola_lightning.models.layers import Head, TokenEmbedding
from cola_lightning.models.mlp import MLP
from cola_lightning.models.projection import CrossLayer, FullRank, MakeProjection
from cola_lightning.models.rotary import Rotary, document_mask, rotary_table


def make_block(config: LlamaConfig, projection: MakeProjection) -> Block:
    """Make one decoder layer, of the classes that the config and the projections need."""
    attention = FusedAttention(config, projection) if config.fused_projections else Attention(config, projection)
    mlp = FusedMLP(config, projection) if config.fused_projections else MLP(config, projection)
    is_cross_layer = any(isinstance(each, CrossLayer) for each in (*attention.children(), *mlp.children()))
    return CrossLayerBlock(config, attention, mlp) if is_cross_layer else Block(config, attention, mlp)


def run_layers(
    layers: Iterable[Callable[..., Any]], x: Tensor, rotary: Rotary, caches: Sequence[KeyValueStore] | None = None
) -> Tensor:
    """Run decoder layers one after another; residual stream (B, T, D) -> (B, T, D).

    Args:
        layers: The layers. Each returns the stream; or, with cross-layer methods, the stream and the tensors that the
            next layer takes.
        x: The stream before the first layer.
        rotary: Positions and mask, the same for all layers.
        caches: Keys and values of each layer, in generation.
    """
    received: Sequence[Tensor] = ()
    for index, layer in enumerate(layers):
        out = layer(x, rotary if caches is None else rotary._replace(cache=caches[index]), *received)
        x, *received = out if isinstance(out, tuple) else (out,)
    return x


class Decoder(nn.Module):
    """Embedding, layers and final norm; token ids (B, T) -> hidden states (B, T, D)."""

    def __init__(self, config: LlamaConfig, projection: MakeProjection) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        # The first layer has no layer before it, so cross-layer projections put another module there.
        first = lambda in_features, out_features: projection(in_features, out_features).in_first_layer()  # noqa: E731
        self.layers = nn.ModuleList(
            make_block(config, projection if index else first) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, document_ids: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = self.embed_tokens(ids)
        seen = 0 if cache is None else cache.length
        if seen and ids.shape[1] > 1 and document_ids is None:
            # Several tokens after a filled cache need a mask, because is_causal aligns the first query with the first
            # key. Make one by numbering all tokens as one document.
            document_ids = ids.new_zeros(1, seen + ids.shape[1])
        rotary = self.rotary(ids.shape[1], like=x, start=seen, cache=cache)
        if document_ids is not None:
            rotary = rotary._replace(mask=document_mask(document_ids, seen))
        x = run_layers(self.layers, x, rotary, None if cache is None else cache.layers)
        return self.norm(x.to(self.norm.weight.dtype))  # a recompute scheme may run the stream in float32

    def rotary(self, length: int, *, like: Tensor, start: int = 0, cache: Cache | None = None) -> Rotary:
        """Return cosine and sine for ``length`` positions from ``start`` on, in dtype and on device of ``like``.

        With a cache they are computed once for all positions that it can hold, unless they depend on the text's length.
        """
        config = self.config
        table = partial(rotary_table, head_dim=config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)
        if cache is None or (config.rope_scaling or {}).get("rope_type") == "dynamic":
            return table(length, like=like, start=start)
        if cache.table is None:
            rotary = table(cache.capacity, like=like)
            cache.table = rotary.cos, rotary.sin
        cos, sin = (part[start : start + length] for part in cache.table)
        return Rotary(cos, sin)


class Llama(nn.Module):
    """LLaMA with an untied head; token ids (B, T) int64 -> logits (B, T, V).

    Args:
        config: The sizes.
        projection: Makes each of the seven projections of a layer from (in_features, out_features).
    """

    def __init__(self, config: LlamaConfig, projection: MakeProjection = FullRank) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, projection)
        self.lm_head = Head(config.hidden_size, config.vocab_size, config.loss_chunk_size)
        # prepare_for_generation may put a CompiledStep here
        self.generation_step: Any = None

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
        """Compute logits, or losses.

        Args:
            ids: Token ids (B, T). With a ``cache``, those that follow the tokens in it.
            document_ids: Number of each token's document (B, T), to keep attention within documents; (B, tokens in the
                cache + T) with a ``cache``. None for causal attention over the whole row.
            cache: The KV cache, in generation. The new keys and values are appended to it.
            targets: Ids to predict (B, T). If given, compute losses as :class:`Head` does.
            reduction: ``none`` for a loss per token, ``sum`` for their sum.
            last_only: Compute logits of each row's last token only.

        Returns:
            Logits (B, T, V), or (B, 1, V) with ``last_only``; or losses (B, T), or their sum ().

        Raises:
            InputError: If the sequence is longer than ``max_position_embeddings``.
        """
        length = ids.shape[1] + (0 if cache is None else cache.length)
        if length > self.config.max_position_embeddings:
            raise InputError(
                f"a sequence of {length} tokens is beyond max_position_embeddings "
                f"{self.config.max_position_embeddings}; shorten it or raise max_position_embeddings"
            )
        hidden = self.model(ids, document_ids, cache)
        if last_only:
            # Two-dimensional, because PyTorch multiplies a slice (B, 1, D) by a frozen head as a batch of matrices, and
            # on a processor in bf16 that copies the whole head.
            return self.lm_head(hidden[:, -1]).unsqueeze(1)
        return self.lm_head(hidden) if targets is None else self.lm_head(hidden, targets, reduction)

    def blocks(self) -> Iterator[Block]:
        """Yield the decoder layers; call this before they are sharded, because FSDP wraps them."""
        for layer in self.model.layers:
            assert isinstance(layer, Block), type(layer).__name__
            yield layer


def build_llama(*, config: LlamaConfig, projection: MakeProjection, **changes: Any) -> Llama:
    """Build a network, with some fields of the config changed."""
    return Llama(replace(config, **changes), projection)
