"""Selective activation checkpointing: keep a layer's input and the outputs of chosen operations.

The idea of CoLA-M (arXiv 2502.10940) is to keep the R-wide latents ``z = A x``, because everything between two of them
is cheap to compute again. The reference implementation keeps them after the nonlinearity, so it has to compute every
down-projection again. Here they are kept before it, and no down-projection is computed again.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cola_lightning.methods.low_rank import LATENT
from cola_lightning.models.activation_checkpointing import RecomputedBlock
from cola_lightning.models.rotary import Rotary
from cola_lightning.private_apis.torch import ATTENTION_OPS, operation_marks

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}


class Selective:
    """The recompute scheme that keeps a layer's input and the outputs of chosen operations.

    Args:
        latents: Keep the latents of projections whose ``keeps_latent`` is true, by default all seven. Only
            nonlinearities, up-projections and attention are then computed again.
        attention: Keep the attention's output and its log-sum-exp, so that attention is not computed again.
        dropout: The layer draws random numbers, and must draw the same numbers again.
    """

    def __init__(self, latents: bool, attention: bool, dropout: bool = False) -> None:
        # The policy is a plain function, because torch.compile loses the object of a bound method.
        policy = partial(_policy, latents, attention)
        self.contexts = partial(create_selective_checkpoint_contexts, policy)
        self.dropout = dropout

    def __call__(
        self, block: RecomputedBlock, x: Tensor, rotary: Rotary, *received: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        return checkpoint(
            block.plain_forward,
            x,
            rotary,
            *received,
            use_reentrant=False,
            preserve_rng_state=self.dropout,  # only if needed, because it synchronizes the device
            context_fn=self.contexts,
        )


def _policy(latents: bool, attention: bool, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Decide whether the output of the operation ``op`` is kept."""
    kept = (latents and op in PRODUCTS and is_latent()) or (attention and op in ATTENTION_OPS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def is_latent() -> bool:
    """Tell whether the current operation makes a latent, by the mark that LowRank sets and not by shape."""
    return LATENT.items() <= operation_marks().items()
