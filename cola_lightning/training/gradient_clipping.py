"""Gradient clipping: by the global norm over all parameters and ranks, between backward and the optimizer's update."""

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer

from cola_lightning.distributed.strategies import clip_gradients
from cola_lightning.errors import InputError
from cola_lightning.private_apis.torch import unscales_by_itself


def clip_by_norm(
    trainer: L.Trainer,
    optimizer: Optimizer,
    parameters: list[nn.Parameter],
    limit: float | None,
    algorithm: str | None,
) -> Tensor | None:
    """Clip gradients to a global norm of ``limit``, and return the norm before clipping.

    Args:
        trainer: The trainer, whose strategy knows how gradients are sharded.
        optimizer: The optimizer that makes its update next.
        parameters: All parameters of the model, on this rank.
        limit: ``--trainer.gradient_clip_val``; None or 0 for no clipping.
        algorithm: ``--trainer.gradient_clip_algorithm``.

    Returns:
        The norm before clipping; None under DeepSpeed, which clips in its own step and knows the norm only after it.

    Raises:
        InputError: If ``algorithm`` is ``value``.
    """
    if algorithm == "value":
        raise InputError(
            "--trainer.gradient_clip_algorithm value is not offered; clipping is by norm, as in the papers"
        )
    # With 16-mixed, gradients are multiplied by a loss scale. A fused optimizer divides by it in its own step, which
    # comes after clipping. So divide here, or the clipped norm would be that of scaled gradients.
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and unscales_by_itself(optimizer):
        scaler.unscale_(optimizer)
    return clip_gradients(trainer.strategy, parameters, limit)
