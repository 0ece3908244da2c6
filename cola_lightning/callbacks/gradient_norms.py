"""Gradient norms by part of the network."""

import re

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from cola_lightning.optim.rows import is_dtensor
from cola_lightning.training.log_steps import at_log_step

GROUPS = {
    "embedding": re.compile(r"\bembed_tokens\."),
    "attention": re.compile(r"\bself_attn\."),
    "mlp": re.compile(r"\bmlp\."),
    "norms": re.compile(r"norm\."),
    "head": re.compile(r"\blm_head\."),
}


class GradientNorms(L.Callback):
    """Log the 2-norm of the gradient of each part of the network, before clipping.

    Names are ``gradient_norm/embedding``, ``attention``, ``mlp``, ``norms`` and ``head``, and ``other`` for parameters
    that a method adds elsewhere. The squares add up to the square of ``train/gradient_norm``. Norms are computed at
    logging steps only.

    Under DeepSpeed and FSDP (1), a rank has flat pieces of gradients, not those of single parameters. There a warning
    says that nothing is logged.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.reachable = not isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy)
        if stage == "fit" and not self.reachable:
            rank_zero_warn(
                f"GradientNorms logs nothing: under {type(trainer.strategy).__name__} gradients cannot be told apart "
                f"by parameter; --trainer.strategy ddp and fsdp2 have them"
            )

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self.reachable and at_log_step(trainer, uncounted=1):
            norms = gradient_norms(pl_module)
            pl_module.log_dict({f"gradient_norm/{group}": norm for group, norm in norms.items()})


def group_of(name: str) -> str:
    """Return the part of the network that a parameter belongs to, by its name."""
    return next((group for group, pattern in GROUPS.items() if pattern.search(name)), "other")


def gradient_norms(module: nn.Module) -> dict[str, Tensor]:
    """Return the 2-norm of the gradients of each part, over all shards. If there are shards, all ranks call this."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(group_of(name), []).append(parameter.grad)
    norms = {group: torch.nn.utils.get_total_norm(gradients) for group, gradients in groups.items()}
    return {group: norm.full_tensor() if is_dtensor(norm) else norm for group, norm in norms.items()}
