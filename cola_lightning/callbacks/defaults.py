"""The default callbacks: those that every run of the command line has."""

from collections.abc import Iterable

import lightning as L

from cola_lightning.callbacks.dashboard import Dashboard
from cola_lightning.callbacks.hyper_parameters import HyperParameters
from cola_lightning.callbacks.log_lines import LogLines
from cola_lightning.callbacks.memory import Memory
from cola_lightning.callbacks.out_of_memory import OutOfMemoryAdvice
from cola_lightning.callbacks.predictions import Predictions
from cola_lightning.callbacks.run_summary import RunSummary
from cola_lightning.callbacks.source_tokens import SourceTokenCounter
from cola_lightning.callbacks.throughput import Throughput


def default_callbacks() -> list[L.Callback]:
    """Make the default callbacks. ``Checkpoints`` and the progress bar, which have flags of their own, come on top."""
    return [
        Throughput(),
        Memory(),
        SourceTokenCounter(),
        Predictions(),
        OutOfMemoryAdvice(),
        HyperParameters(),
        Dashboard(),
        LogLines(),
        RunSummary(),
    ]


def defaults_beside(named: Iterable[L.Callback], defaults: Iterable[L.Callback]) -> list[L.Callback]:
    """Return the default callbacks without those that the user named, with settings of their own."""
    named = list(named)
    return [default for default in defaults if not any(isinstance(callback, type(default)) for callback in named)]
