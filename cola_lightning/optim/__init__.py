"""Schedules, and optimizers that no library has right. Other optimizers come from libraries by class_path."""

from cola_lightning.optim.apollo import APOLLO
from cola_lightning.optim.fira import Fira
from cola_lightning.optim.galore import GaLore
from cola_lightning.optim.muon import Muon
from cola_lightning.optim.parameter_groups import HybridOptimizer, MakeOptimizer, Parameters
from cola_lightning.optim.row_adamw import RowAdamW
from cola_lightning.optim.schedules import MakeSchedule, WarmupCosine, WarmupCosineRestarts, WarmupStableDecay
from cola_lightning.optim.transformers_adamw import TransformersAdamW

__all__ = [
    "APOLLO",
    "Fira",
    "GaLore",
    "HybridOptimizer",
    "MakeOptimizer",
    "MakeSchedule",
    "Muon",
    "Parameters",
    "RowAdamW",
    "TransformersAdamW",
    "WarmupCosine",
    "WarmupCosineRestarts",
    "WarmupStableDecay",
]
