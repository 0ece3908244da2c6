"""LoRA from scratch (LoRA: arXiv 2106.09685; as a pre-training baseline: GaLore, arXiv 2403.03507),
``y = W x + (α / R) B A x`` with W random and frozen.

Embedding, head and norms train in full. α, dropout and initialization are those that GaLore's paper gives for its
baseline. Frozen weights get no gradient, so no optimizer moves, decays or keeps moments for them.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cola_lightning.errors import InputError
from cola_lightning.methods.low_rank import check_rank
from cola_lightning.models.projection import Projection


class LoRA(Projection):
    """``W x + (α / R) B A dropout(x)``, with A: in -> R and B: R -> out trained and W (out, in) frozen.

    W starts as N(0, 0.02²) like an ordinary LLaMA's, A as U(±1/√in), B at zero.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Width R of the trained branch.
        alpha: The trained branch is scaled by alpha / R.
        dropout: Share of the inputs of the trained branch that a training step drops. With the callback ``StepSeed``
            the drawing is the same when a run is resumed.
        trainable_scale: Train the scale instead: tanh(t) with one t for each matrix, which starts at 1; ``alpha`` does
            nothing then. An option of the ReLoRA reference.

    Raises:
        InputError: If the rank or the dropout is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float = 32.0,
        dropout: float = 0.05,
        trainable_scale: bool = False,
    ) -> None:
        super().__init__()
        check_rank(in_features, out_features, rank)
        self.rank = rank
        if not 0 <= dropout < 1:
            raise InputError(f"dropout is {dropout}; it must be a share from 0 to below 1")
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        self.dropout = nn.Dropout(dropout)
        self.fixed_scale = alpha / rank
        self.trained_scale = nn.Parameter(torch.empty(1)) if trainable_scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # U(±1/√in)
        nn.init.zeros_(self.B)
        if self.trained_scale is not None:
            nn.init.ones_(self.trained_scale)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight) + linear(linear(self.dropout(x), self.A) * self.scale(), self.B)

    def dense(self) -> Tensor:
        """``W + (α / R) B A``, (out, in)."""
        return self.weight + (self.B * self.scale()) @ self.A

    def scale(self) -> float | Tensor:
        """What the trained branch is multiplied by."""
        return self.fixed_scale if self.trained_scale is None else self.trained_scale.tanh()
