"""Progress as lines of text, for files, pipes and batch jobs."""

import sys
import time
from collections import deque
from datetime import datetime, timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich import get_console

from cola_lightning.provenance import run_folder
from cola_lightning.training.log_steps import at_log_step

FILE = "train.log"
INTERVALS = 20
"""Logging intervals that the time left is estimated from."""


class LogLines(L.Callback):
    """Writes a line per logging interval and per validation into ``train.log`` in the run's directory, and to standard
    error where no progress bar can be seen.

    A line tells the step and the number of all steps, loss, learning rate, gradient norm before clipping, tokens per
    second, and the time left at the pace of the last intervals, validations included. Rank 0 alone writes.

    Args:
        terminal: Write to standard error: true, false, or null for only where there is no bar on a terminal.
        file: Write to ``train.log``; a resumed run adds to it.
    """

    def __init__(self, terminal: bool | None = None, file: bool = True) -> None:
        self.terminal, self.file = terminal, file

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not when training starts: a resumed run with no step left may only make up for a validation.
        has_bar = any(isinstance(callback, ProgressBar) for callback in trainer.callbacks)
        shown = has_bar and get_console().is_terminal
        self._terminal = not shown if self.terminal is None else self.terminal
        self._path = run_folder(trainer) / FILE if self.file and not trainer.fast_dev_run else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._times = deque([(trainer.global_step, time.monotonic())], maxlen=INTERVALS + 1)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_log_step(trainer):
            return
        metrics = trainer.callback_metrics  # on all ranks, because reading them may need the others
        self._times.append((trainer.global_step, time.monotonic()))
        parts = [
            f"{name} {float(metrics[key]):{form}}"
            for name, key, form in (
                ("loss", "train/loss", ".4f"),
                ("learning rate", "train/learning_rate", ".3g"),
                ("gradient norm", "train/gradient_norm", ".4g"),
                ("tokens/s", "train/tokens_per_second", ",.0f"),
            )
            if key in metrics
        ]
        left = self._time_left(trainer)
        self._write(trainer, [*parts, *([f"{left} left"] if left else [])])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        perplexity = trainer.callback_metrics.get("val/perplexity")
        if perplexity is not None:
            self._write(trainer, [f"validation perplexity {float(perplexity):,.4f}"])

    def _time_left(self, trainer: L.Trainer) -> str | None:
        (first, began), (last, now) = self._times[0], self._times[-1]
        if last == first or trainer.max_steps < 0:
            return None
        return str(timedelta(seconds=round((trainer.max_steps - last) * (now - began) / (last - first))))

    def _write(self, trainer: L.Trainer, parts: list[str]) -> None:
        if not trainer.is_global_zero:
            return
        of = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        line = " | ".join([f"step {trainer.global_step}{of}", *parts])
        if self._terminal:
            print(line, file=sys.stderr, flush=True)
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now().isoformat(timespec='seconds')} {line}\n")
        except OSError as error:  # a full disk does not end the run
            print(f"{self._path} cannot be written: {error}", file=sys.stderr, flush=True)
