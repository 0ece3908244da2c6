"""Schedules. Optimizers come from libraries by class_path."""

from cola_lightning.optim.schedules import WarmupCosine

__all__ = ["WarmupCosine"]
