"""Callbacks, one concern per file. ``defaults`` lists those that every run has."""

from cola_lightning.callbacks.activation_spectrum import ActivationSpectrum
from cola_lightning.callbacks.baseline_perplexity import BaselinePerplexity
from cola_lightning.callbacks.checkpoints import Checkpoints
from cola_lightning.callbacks.dashboard import Dashboard
from cola_lightning.callbacks.evaluate_tasks import EvaluateTasks
from cola_lightning.callbacks.gradient_norms import GradientNorms
from cola_lightning.callbacks.hyper_parameters import HyperParameters
from cola_lightning.callbacks.log_lines import LogLines
from cola_lightning.callbacks.loss_guard import LossGuard
from cola_lightning.callbacks.memory import Memory
from cola_lightning.callbacks.out_of_memory import OutOfMemoryAdvice
from cola_lightning.callbacks.predictions import Predictions
from cola_lightning.callbacks.progress import Progress
from cola_lightning.callbacks.run_summary import RunSummary
from cola_lightning.callbacks.samples import Samples
from cola_lightning.callbacks.source_tokens import SourceTokenCounter
from cola_lightning.callbacks.step_seed import StepSeed
from cola_lightning.callbacks.throughput import Throughput
from cola_lightning.callbacks.training_picture import TrainingPicture

__all__ = [
    "ActivationSpectrum",
    "BaselinePerplexity",
    "Checkpoints",
    "Dashboard",
    "EvaluateTasks",
    "GradientNorms",
    "HyperParameters",
    "LogLines",
    "LossGuard",
    "Memory",
    "OutOfMemoryAdvice",
    "Predictions",
    "Progress",
    "RunSummary",
    "Samples",
    "SourceTokenCounter",
    "StepSeed",
    "Throughput",
    "TrainingPicture",
]
