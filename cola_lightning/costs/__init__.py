"""Predict the costs of a run: parameters, FLOPs, memory of a GPU, days."""

from cola_lightning.costs.gpus import GPUS, Gpu, gpu_named, gpu_reported
from cola_lightning.costs.memory_layout import MemoryLayout, memory_layout
from cola_lightning.costs.parameters import Parameters, count_parameters
from cola_lightning.costs.run_costs import Memory, Run
from cola_lightning.costs.trace import Flops, Trace, trace

__all__ = [
    "GPUS",
    "Flops",
    "Gpu",
    "Memory",
    "MemoryLayout",
    "Parameters",
    "Run",
    "Trace",
    "count_parameters",
    "gpu_named",
    "gpu_reported",
    "memory_layout",
    "trace",
]
