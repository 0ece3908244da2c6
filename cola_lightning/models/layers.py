"""Linear map, scalar, token embedding and head: modules that own weights and initialize them."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cola_lightning.models.initialization import WEIGHT_STD
from cola_lightning.models.loss import token_losses


def plain_product(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply (…, in) by a matrix (out, in); -> (…, out). There is no scale where the matrix is not int8."""
    return linear(x, weight)


class NormalLinear(nn.Linear):
    """A linear map without bias whose weight is initialized as N(0, ``std``²); (…, in) -> (…, out).

    Attributes:
        scale: One factor per row (out,) where the weight is int8; else None. See :mod:`cola_lightning.inference.int8`.
        product: Computes the output from input, weight and scale. Generation may replace it.
    """

    scale: Tensor | None
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(plain_product)

    def __init__(self, in_features: int, out_features: int, std: float = WEIGHT_STD) -> None:
        self.std = std  # set first, because nn.Linear's constructor calls reset_parameters
        super().__init__(in_features, out_features, bias=False)
        self.register_buffer("scale", None)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.scale)


class Scalar(nn.Module):
    """A learned number. It has the shape (1,), because sharded strategies cannot split a tensor without dimensions."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.start)


class TokenEmbedding(nn.Embedding):
    """Token embedding (B, T) -> (B, T, D), initialized as N(0, 0.02²); the padding row is zero and stays zero.

    Attributes:
        scale: One factor per row (V,) where the weight is int8; else None.
    """

    scale: Tensor | None

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.register_buffer("scale", None)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=WEIGHT_STD)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x if self.scale is None else x.to(self.scale.dtype) * self.scale[ids, None]


class Head(NormalLinear):
    """The output layer: hidden states (…, D) -> logits (…, V), or (B, T, D) -> losses of the target tokens.

    Args:
        hidden_size: D.
        vocab_size: V.
        loss_chunk_size: Tokens whose logits exist at a time in training, see
            :func:`~cola_lightning.models.loss.token_losses`. None for all at once.
    """

    def __init__(self, hidden_size: int, vocab_size: int, loss_chunk_size: int | None = None) -> None:
        super().__init__(hidden_size, vocab_size)
        self.loss_chunk_size = loss_chunk_size
        self.compiles_chunks = False

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile head and loss by ``torch.compile``; with ``loss_chunk_size``, what is done to a chunk's logits."""
        if self.loss_chunk_size is None:
            super().compile(*args, **kwargs)
        else:
            self.compiles_chunks = True

    def forward(self, x: Tensor, targets: Tensor | None = None, reduction: Literal["none", "sum"] = "none") -> Tensor:
        """Compute logits; or, with ``targets`` (B, T), losses as :func:`~cola_lightning.models.loss.token_losses`."""
        if targets is None:
            return self.product(x, self.weight, self.scale)
        return token_losses(x, self.weight, targets, reduction, self.loss_chunk_size, self.compiles_chunks)
