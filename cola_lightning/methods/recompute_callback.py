"""Base of the callbacks that make decoder layers recompute: CoLAM and CRNetRecompute."""

from collections.abc import Callable
from typing import Protocol, cast

import lightning as L

from cola_lightning.errors import InputError
from cola_lightning.models import Llama


class _Module(Protocol):
    transforms: list[Callable[[Llama], None]]


class RecomputeCallback(L.Callback):
    """Changes the network before it is compiled and sharded, so that its layers recompute in the backward pass.

    Raises:
        InputError: When the run starts, if another recompute callback is in the list.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        for other in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it without declaring it
            if isinstance(other, RecomputeCallback) and other is not self:
                raise InputError(
                    f"{type(self).__name__} and {type(other).__name__} are both among the callbacks; remove one, "
                    f"because a layer can be checkpointed one way only"
                )
        transforms = cast(_Module, pl_module).transforms
        if self.apply not in transforms:  # a second fit sets up the same callback again
            transforms.append(self.apply)

    def apply(self, network: Llama) -> None:
        """Set up every layer of ``network``; called before it is compiled and sharded."""
        raise NotImplementedError
