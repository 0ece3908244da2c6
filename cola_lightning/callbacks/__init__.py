"""One concern per file, each with its own state."""

from cola_lightning.callbacks.cola_m import CoLAM
from cola_lightning.callbacks.cr_net import CRNetRecompute
from cola_lightning.callbacks.ledger import Ledger
from cola_lightning.callbacks.predictions import Predictions
from cola_lightning.callbacks.progress import Progress
from cola_lightning.callbacks.samples import Samples
from cola_lightning.callbacks.step_seed import StepSeed
from cola_lightning.callbacks.throughput import Throughput
from cola_lightning.callbacks.yardsticks import Yardsticks

__all__ = [
    "CRNetRecompute",
    "CoLAM",
    "Ledger",
    "Predictions",
    "Progress",
    "Samples",
    "StepSeed",
    "Throughput",
    "Yardsticks",
]
