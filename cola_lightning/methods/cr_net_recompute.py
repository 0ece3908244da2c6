"""CR-Net's recomputation as a callback."""

import lightning as L

from cola_lightning.errors import InputError
from cola_lightning.methods.cola_m.callback import CoLAM
from cola_lightning.methods.cr_net import Recompute
from cola_lightning.models import Llama


class CRNetRecompute(L.Callback):
    """Activation checkpointing for CR-Net (arXiv 2509.18993): keeps the layers' inputs and latents, and recovers the
    projections' outputs from the last layer downwards. Changes neither parameters nor checkpoints; may be switched when
    a run resumes. Validation is never checkpointed.

    Args:
        anchor_every: Keep the outputs of every so many layers, from the last one down. Each recovery divides the error
            it inherits by ``s(β)``: fewer layers between anchors cost memory and gain accuracy.

    Raises:
        InputError: When the run starts, if the projections are not CR-Net's or CoLAM checkpoints the layers too.
    """

    def __init__(self, anchor_every: int = 8) -> None:
        if anchor_every < 1:
            raise InputError(f"anchor_every is {anchor_every}; it must be at least 1")
        self.anchor_every = anchor_every

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if any(isinstance(callback, CoLAM) for callback in trainer.callbacks):
            raise InputError("CRNetRecompute and CoLAM are both among the callbacks; a layer is checkpointed one way")
        if self.apply not in pl_module.transforms:
            pl_module.transforms.append(self.apply)

    def apply(self, network: Llama) -> None:
        """Set every layer of ``network`` up; called before it is compiled and sharded."""
        Recompute(self.anchor_every).attach(network)
