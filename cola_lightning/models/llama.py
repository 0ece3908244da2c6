"""The one decoder of this code base: LLaMA (RMSNorm, rotary positions, grouped-query attention, gated MLP).

Shapes by the legend of :mod:`cola_lightning.models.block`, where a layer is.

Parameter names are those of Hugging Face's ``LlamaForCausalLM``, so its weights load without renaming.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from cola_lightning.errors import InputError
from cola_lightning.models.block import MLP, Attention, Block
from cola_lightning.models.config import LlamaConfig
from cola_lightning.models.cross_layer import CrossLayerBlock
from cola_lightning.models.fused import FusedAttention, FusedMLP
from cola_lightning.models.kv_cache import Cache, LayerCache
from cola_lightning.models.layers import CrossLayer, FullRank, Head, MakeProjection, TokenEmbedding
from cola_lightning.models.rotary import Rotary, document_mask, rotary_table


def make_block(config: LlamaConfig, projection: MakeProjection) -> Block:
    """Make one decoder layer: plain, or of the subclasses that its projections and the config ask for."""
    attention = (FusedAttention if config.fused_projections else Attention)(config, projection)
    mlp = (FusedMLP if config.fused_projections else MLP)(config, projection)
    crosses = any(isinstance(each, CrossLayer) for each in (*attention.children(), *mlp.children()))
    return (CrossLayerBlock if crosses else Block)(config, attention, mlp)


def run_layers(
    layers: Iterable[nn.Module], x: Tensor, rotary: Rotary, caches: Sequence[LayerCache] | None = None
) -> Tensor:
    """Run decoder layers one after another; residual stream (B, T, D) -> (B, T, D).

    Args:
        layers: Each returns the stream, or the stream and tensors that the next one takes (cross-layer methods).
        x: The stream before the first of them.
        rotary: Positions and mask, the same for all layers.
        caches: In generation, keys and values of each layer.
    """
    received: tuple[Tensor, ...] = ()
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
        # Cross-layer projections have no layer before the first, and put something else there.
        first = lambda in_features, out_features: projection(in_features, out_features).in_first_layer()  # noqa: E731
        self.layers = nn.ModuleList(
            make_block(config, projection if index else first) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, document_ids: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = self.embed_tokens(ids)
        seen = 0 if cache is None else cache.length
        if seen and ids.shape[1] > 1 and document_ids is None:
            document_ids = ids.new_zeros(1, seen + ids.shape[1])  # all one document
        rotary = self.rotary(ids.shape[1], like=x, start=seen)
        if document_ids is not None:
            rotary = rotary._replace(mask=document_mask(document_ids, seen))
        x = run_layers(self.layers, x, rotary, None if cache is None else cache.layers)
        return self.norm(x.to(self.norm.weight.dtype))  # a recompute scheme may run the stream in float32

    def rotary(self, length: int, *, like: Tensor, start: int = 0) -> Rotary:
        """Rotary angles of positions ``start`` to ``start + length``, in dtype and on device of ``like``."""
        config = self.config
        return rotary_table(
            length, config.head_dim, config.rope_theta, like=like, start=start, scaling=config.rope_scaling
        )


class Llama(nn.Module):
    """LLaMA with an untied head; token ids (B, T) int64 -> logits (B, T, V).

    Args:
        config: Its sizes.
        projection: Makes each of the seven projections of a layer from (in_features, out_features).
    """

    def __init__(self, config: LlamaConfig, projection: MakeProjection = FullRank) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, projection)
        self.lm_head = Head(config.hidden_size, config.vocab_size, config.loss_chunk_size)

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
        if length > self.config.max_position_embeddings:
            raise InputError(
                f"a sequence of {length} tokens is beyond max_position_embeddings "
                f"{self.config.max_position_embeddings}; shorten it or raise max_position_embeddings"
            )
        hidden = self.model(ids, document_ids, cache)
        if last_only:
            hidden = hidden[:, -1:]
        return self.lm_head(hidden) if targets is None else self.lm_head(hidden, targets, reduction)


def build_llama(*, config: LlamaConfig, projection: MakeProjection, **changes: Any) -> Llama:
    """Build a network, with some fields of its config changed."""
    return Llama(replace(config, **changes), projection)
