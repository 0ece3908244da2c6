"""Running the network to look at it, beside training."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn


@contextmanager
def monitoring_forward(trainer: L.Trainer) -> Iterator[nn.Module]:
    """Something that maps ids (B, T) to logits (B, T, V) as in training, without gradients and without compiling.

    Every rank has to run it as often, for where weights are sharded they are gathered for each run.
    """
    # The first FSDP gathers the weights outside the layers only where its own wrapper is called.
    root = trainer.strategy.model if isinstance(trainer.strategy, FSDPStrategy) else trainer.lightning_module.network
    # A compiled layer sees no hooks that were set later, and is compiled again for each new length.
    with torch.no_grad(), trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
        yield root
