"""CoLA-M (arXiv 2502.10940): what a training step keeps of a layer between forward and backward.

The paper's idea is that the R-wide latents ``z = A x`` are all one needs to keep: everything between two of them is
cheap to do again. The reference implementation keeps them after the nonlinearity, and so has to run the whole forward
pass twice. Kept before it, no down-projection is ever done again.

Two recompute schemes (see :mod:`cola_lightning.models.activation_checkpointing`) do this: :class:`Selective` here and
:class:`~cola_lightning.methods.cola_m.reversible.Reversible`.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cola_lightning.methods.low_rank import LATENT
from cola_lightning.models.activation_checkpointing import RecomputedBlock
from cola_lightning.models.rotary import Rotary
from cola_lightning.private_apis import ATTENTION_OPS, operation_marks

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}


class Selective:
    """Keep a layer's input, and of what happens inside only the chosen operations' outputs; do the rest again.

    Args:
        latents: Keep the seven latents. Then only nonlinearities, up-projections and attention are done again.
        attention: Keep the attention's output and its log-sum-exp, so that attention is not done again either.
        dropout: Something in the layer draws at random, and has to draw the same again.
    """

    def __init__(self, latents: bool, attention: bool, dropout: bool = False) -> None:
        # Plain functions, not methods of this object: torch.compile loses the object.
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
            preserve_rng_state=self.dropout,  # only where it is needed: reading the state makes a device wait
            context_fn=self.contexts,
        )


def _policy(latents: bool, attention: bool, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = (latents and op in PRODUCTS and is_latent()) or (attention and op in ATTENTION_OPS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def is_latent() -> bool:
    """Whether the operation being run, or traced, makes a latent; told by its owner's mark and not by its shape."""
    return LATENT.items() <= operation_marks().items()
