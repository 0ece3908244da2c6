"""Measuring training steps and generation: of several networks in one run, under one protocol."""

from cola_lightning.benchmark.generating import measure_generation
from cola_lightning.benchmark.report import report
from cola_lightning.benchmark.targets import BenchmarkTarget, ExternalModel, GeneratingModel, PackageModel
from cola_lightning.benchmark.training import measure_training

__all__ = [
    "BenchmarkTarget",
    "ExternalModel",
    "GeneratingModel",
    "PackageModel",
    "measure_generation",
    "measure_training",
    "report",
]
