"""LlamaConfig: the sizes of a network and how it computes."""

import math
from dataclasses import dataclass

from cola_lightning.errors import InputError
from cola_lightning.models.rope_scaling import Scaling, check_scaling

LARGEST_SIZE = 10**9
"""Largest number of layers, rows, columns or positions. The product of two such numbers still fits 64 bits."""


@dataclass
class LlamaConfig:
    """Sizes of a :class:`~cola_lightning.models.Llama`, and how it computes.

    Args:
        vocab_size: Rows of the embedding and of the head (V).
        hidden_size: Width of the residual stream (D).
        intermediate_size: Width inside the MLP (F).
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Query heads (H); must divide ``hidden_size`` into even parts.
        num_key_value_heads: Key and value heads (K), a divisor of H. None for as many as query heads.
        max_position_embeddings: Longest sequence that is accepted, in tokens.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: How the frequencies are stretched to longer texts, by Hugging Face's names; see
            :mod:`cola_lightning.models.rope_scaling`. None for unscaled frequencies.
        rms_norm_eps: Epsilon inside RMSNorm.
        gate_silu: Keep LLaMA's SiLU on the MLP's gate. Full rank needs it. The CoLA paper keeps it beside the latent
            nonlinearity at 60M and 130M and drops it from 350M up (arXiv 2502.10940, ablation of σ's place).
        pad_token_id: Id whose embedding stays zero; None for no such id.
        fused_projections: Join the matrices of q, k and v into one product, and those of gate and up, because they
            share their input. Parameters keep their names.
        loss_chunk_size: Tokens whose logits exist at a time in training, see
            :func:`~cola_lightning.models.loss.token_losses`. None for all at once.

    Raises:
        InputError: If the sizes do not fit together. The message names the value and the fix.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    rms_norm_eps: float = 1e-6
    gate_silu: bool = True
    pad_token_id: int | None = 0
    fused_projections: bool = False
    loss_chunk_size: int | None = None

    @property
    def key_value_heads(self) -> int:
        """K, also where ``num_key_value_heads`` is None."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """E = D / H."""
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self) -> None:
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.key_value_heads,
            "max_position_embeddings": self.max_position_embeddings,
        }
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
            if value > LARGEST_SIZE:
                raise InputError(f"{name} is {value}; {LARGEST_SIZE:,} is the most")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}; "
                f"choose a divisor, for instance {_nearest_divisor(self.hidden_size, self.num_attention_heads)}"
            )
        if not 1 < self.rope_theta < math.inf:
            raise InputError(f"rope_theta is {self.rope_theta}; it must be a number above 1, for instance 10000")
        if not 0 <= self.rms_norm_eps < math.inf:
            raise InputError(
                f"rms_norm_eps is {self.rms_norm_eps}; it must be a number of at least 0, for instance 1e-6"
            )
        if self.head_dim % 2:
            raise InputError(
                f"hidden_size {self.hidden_size} / num_attention_heads {self.num_attention_heads} gives heads of "
                f"{self.head_dim}, but rotary positions need an even head dimension; change one of the two"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise InputError(
                f"num_key_value_heads {self.key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}; choose a divisor, for instance "
                f"{_nearest_divisor(self.num_attention_heads, self.key_value_heads)}"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise InputError(
                f"pad_token_id {self.pad_token_id} is not one of the {self.vocab_size} ids of the vocabulary; "
                f"choose one below {self.vocab_size}, or null"
            )
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise InputError(f"loss_chunk_size is {self.loss_chunk_size}; it must be at least 1, or null")
        if self.rope_scaling is not None:
            self.rope_scaling = check_scaling(self.rope_scaling, self.head_dim)


def _nearest_divisor(n: int, wanted: int) -> int:
    """Find the divisor of ``n`` that is nearest to ``wanted``."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return min(sorted([*small, *(n // d for d in small)]), key=lambda d: abs(d - wanted))
