"""Singular values and effective rank of a matrix of activations."""

import torch
from torch import Tensor


def squared_singular_values(x: Tensor) -> Tensor:
    """Return the min(N, W) squared singular values of a matrix (N, W), the largest first, in float32 on the CPU.

    They are the eigenvalues of the smaller of ``x xᵀ`` and ``xᵀ x``, computed in float32. Values below 1e-7 of the
    largest are rounding errors.
    """
    x = x.float()
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cpu()


def effective_rank(squares: Tensor, share: float = 0.95) -> int:
    """Return r(α) = min{k : Σ_{i≤k} σ_i² ≥ α Σ_i σ_i²}, the CoLA paper's effective rank (arXiv 2502.10940).

    Args:
        squares: σ_i², the largest first; at least one.
        share: α, above 0 and at most 1; 0.95 in the paper.
    """
    held = squares.double().cumsum(0)
    return int((held < share * held[-1]).sum()) + 1
