"""Schedules, and the one optimizer that no library has. Others come from libraries by class_path."""

from cola_lightning.optim.row_adamw import RowAdamW
from cola_lightning.optim.schedules import WarmupCosine, WarmupCosineRestarts

__all__ = ["RowAdamW", "WarmupCosine", "WarmupCosineRestarts"]
