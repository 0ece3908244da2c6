"""LoRA from scratch: ``y = W x + (α / R) B A x`` with W random and frozen.

LoRA is arXiv 2106.09685; the GaLore paper (arXiv 2403.03507) uses it as a baseline of pre-training, and α, dropout and
initialization are those that it gives. Embedding, head and norms train in full. Frozen weights get no gradient, so
optimizers neither move nor decay them, nor keep moments for them.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cola_lightning.errors import InputError
from cola_lightning.methods.arguments import check_rank
from cola_lightning.models.projection import Projection


class LoRA(Projection):
    """``W x + (α / R) B A dropout(x)``, with A: in -> R and B: R -> out trained and W (out, in) frozen.

    W is initialized as N(0, 0.02²) as in LLaMA, A as U(±1/√in), B with zero.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Width R of the trained branch.
        alpha: The trained branch is scaled by alpha / R.
        dropout: Share of the inputs of the trained branch that a training step drops. With the callback ``StepSeed``
            a resumed run drops the same inputs.

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
        self.scale = alpha / rank
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # U(±1/√in)
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight) + linear(linear(self.dropout(x), self.A) * self.scale, self.B)

    def dense(self) -> Tensor:
        """Return ``W + (α / R) B A`` (out, in)."""
        return self.weight + (self.B * self.scale) @ self.A
