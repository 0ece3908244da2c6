"""Run the network to measure it, between training steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn


@contextmanager
def monitoring_forward(trainer: L.Trainer) -> Iterator[nn.Module]:
    """Yield a network that maps ids (B, T) to logits (B, T, V) as in training, without gradients and compilation.

    All ranks call the network equally often, because each call gathers weights that are sharded.
    """
    # FSDP (1) gathers the weights outside the layers only if its own wrapper is called.
    root = trainer.strategy.model if isinstance(trainer.strategy, FSDPStrategy) else trainer.lightning_module.network
    assert isinstance(root, nn.Module)
    # A compiled layer ignores hooks that are set later, and is compiled again for each new length.
    with torch.no_grad(), trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
        yield root
