"""Measuring training steps and generation: of several networks in one run, under one protocol."""

from cola_lightning.benchmark.generating import measure_generation
from cola_lightning.benchmark.options import parse
from cola_lightning.benchmark.report import report
from cola_lightning.benchmark.subject import Own, Peer, Subject
from cola_lightning.benchmark.training import measure_training

__all__ = ["Own", "Peer", "Subject", "measure_generation", "measure_training", "parse", "report"]
