"""The leaves of the network that carry weights, each of which knows how it starts.

A module that owns parameters directly has a ``reset_parameters`` that alone decides their first values. Whoever
materializes a network piece by piece (FSDP and ZeRO-3 do) then gets the same distribution as whoever builds it whole.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from cola_lightning.errors import InputError
from cola_lightning.models.loss import at_least_float32, chunked_loss_sum


class NormalLinear(nn.Linear):
    """A linear map without bias whose weight starts as N(0, ``std``²); input (…, in), output (…, out)."""

    def __init__(self, in_features: int, out_features: int, std: float = 0.02) -> None:
        self.std = std  # nn.Linear's constructor already calls reset_parameters
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class Projection(nn.Module):
    """Base of what may stand for one of a layer's seven dense matrices: (…, in_features) -> (…, out_features), without
    bias. A subclass takes the two sizes first, and arguments of its own after them.

    Attributes:
        rank: Width R of its bottleneck or trained branch; None where it has none.
    """

    rank: int | None = None

    def in_first_layer(self) -> "Projection":
        """What stands in the first layer in its place: itself, unless it needs the layer before."""
        return self

    @classmethod
    def forward_fused(cls, projections: Sequence["Projection"], x: Tensor) -> Sequence[Tensor]:
        """Call projections of this class that share the input ``x``. A subclass may join their matrices into one
        product: then the input is read once, and the backward pass need not add up a gradient for each."""
        return [projection(x) for projection in projections]

    def dense(self) -> Tensor | None:
        """The matrix (out_features, in_features) that does the same, for a projection that is a linear map; it says so
        by overriding this. None for one that is not."""
        return None


class CrossLayer(Projection):
    """A projection that also takes a tensor from its counterpart in the layer before, and gives one to the next:
    ``forward(x, received)`` returns its output (…, out_features) and the tensor for the next layer. In the first layer
    ``received`` is None. See :mod:`cola_lightning.models.cross_layer`."""


MakeProjection = Callable[[int, int], Projection]
"""``f(in_features, out_features)`` makes a projection."""


class FullRank(NormalLinear, Projection):
    """The projection of an ordinary LLaMA: one dense matrix, started as N(0, 0.02²)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)

    def dense(self) -> Tensor:
        return self.weight.detach()

    @classmethod
    def forward_fused(cls, projections: Sequence["FullRank"], x: Tensor) -> Sequence[Tensor]:
        weights = [projection.weight for projection in projections]
        return linear(x, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1)


class Scalar(nn.Module):
    """A learned number, as a ``weight`` of shape (1,), for sharded strategies cannot cut up what has no dimension."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.start)


class TokenEmbedding(nn.Embedding):
    """Token embedding (B, T) -> (B, T, D), started as N(0, 0.02²), the padding row at zero and kept there."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].zero_()


class Head(NormalLinear):
    """Hidden states (B, T, D) -> logits (B, T, V), or the losses of the tokens that should follow.

    Args:
        hidden_size: D.
        vocab_size: V.
        loss_chunk_size: Tokens whose logits exist at a time in training, see
            :func:`~cola_lightning.models.loss.chunked_loss_sum`. None for all at once.

    Raises:
        InputError: If the number is not positive.
    """

    def __init__(self, hidden_size: int, vocab_size: int, loss_chunk_size: int | None = None) -> None:
        super().__init__(hidden_size, vocab_size)
        if loss_chunk_size is not None and loss_chunk_size < 1:
            raise InputError(f"loss_chunk_size is {loss_chunk_size}; it must be at least 1, or null")
        self.loss_chunk_size = loss_chunk_size

    def forward(self, x: Tensor, targets: Tensor | None = None, reduction: Literal["none", "sum"] = "none") -> Tensor:
        """Logits; or with ``targets`` (B, T) losses in nats, for each token (B, T) or their sum, zero where a target is
        -100."""
        if targets is None:
            return linear(x, self.weight)
        x, flat = x.flatten(0, 1), targets.flatten()
        if reduction == "sum" and self.loss_chunk_size is not None:
            return chunked_loss_sum(x, self.weight, flat, self.loss_chunk_size)
        losses = cross_entropy(at_least_float32(linear(x, self.weight)), flat, reduction=reduction)
        return losses if reduction == "sum" else losses.view_as(targets)
