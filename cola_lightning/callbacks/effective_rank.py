"""How many directions activations really use: singular values, and the effective rank."""

import torch
from torch import Tensor


def squared_singular_values(x: Tensor) -> Tensor:
    """Of a matrix (N, W), min(N, W) float32 values on the CPU, the largest first.

    They are the eigenvalues of the smaller of ``x xᵀ`` and ``xᵀ x``, formed in float32: those below 1e-7 of the largest
    are rounding.
    """
    x = x.float()
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cpu()


def effective_rank(squares: Tensor, share: float = 0.95) -> int:
    """r(α) = min{k : Σ_{i≤k} σ_i² ≥ α Σ_i σ_i²}: how many of the leading singular values hold a ``share`` α of the
    squared spectrum (the CoLA paper's effective rank, arXiv 2502.10940, with α = 0.95).

    Args:
        squares: σ_i², the largest first; at least one.
        share: α, above 0 and at most 1.
    """
    held = squares.double().cumsum(0)
    return int((held < share * held[-1]).sum()) + 1
