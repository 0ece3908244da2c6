"""Attention and MLP that join the matrices of projections with the same input into one product.

The classes add no parameters and change no names, so ``fused_projections`` can be switched when a run resumes. Joining
matrices costs a copy of them. That is little beside the products of a training step and much beside those of a single
token, so validation and generation take the plain path.
"""

import torch
from torch import Tensor

from cola_lightning.models.attention import Attention
from cola_lightning.models.mlp import MLP
from cola_lightning.models.rotary import Rotary


class FusedAttention(Attention):
    """Attention that computes q, k and v by one product in training; (B, T, D) -> (B, T, D)."""

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x, rotary)
        q, k, v = self.q_proj.forward_fused((self.q_proj, self.k_proj, self.v_proj), x)
        return self.o_proj(self.mix(q, k, v, rotary))


class FusedMLP(MLP):
    """MLP that computes gate and up by one product in training; (B, T, D) -> (B, T, D)."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        gate, up = self.gate_proj.forward_fused((self.gate_proj, self.up_proj), x)
        return self.down_proj(self.combine(gate, up))
