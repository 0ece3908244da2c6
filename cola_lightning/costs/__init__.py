"""What a run costs, before it runs: parameters, FLOPs, memory of a GPU, days."""

from cola_lightning.costs.gpus import GPUS, Gpu, gpu_named, gpu_reported
from cola_lightning.costs.layout import Layout, lay_out
from cola_lightning.costs.parameters import Parameters, count_parameters
from cola_lightning.costs.run import Memory, Run
from cola_lightning.costs.trace import Flops, Trace, trace

__all__ = [
    "GPUS",
    "Flops",
    "Gpu",
    "Layout",
    "Memory",
    "Parameters",
    "Run",
    "Trace",
    "count_parameters",
    "gpu_named",
    "gpu_reported",
    "lay_out",
    "trace",
]
