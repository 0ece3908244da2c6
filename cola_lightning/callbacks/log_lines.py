"""Progress as lines of text, for terminals, files, pipes and batch jobs."""

import shutil
import sys
import time
from collections import deque
from datetime import datetime, timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info
from rich import get_console

from cola_lightning.columns import in_columns
from cola_lightning.provenance import run_folder
from cola_lightning.training.log_steps import at_log_step
from cola_lightning.training.trainer_attributes import callbacks_of, is_fast_dev_run

FILE = "train.log"
INTERVALS = 20
"""Logging intervals from which the time left is estimated."""
VALUES = (
    ("loss", "train/loss", ".4f"),
    ("learning rate", "train/learning_rate", ".3g"),
    ("gradient norm", "train/gradient_norm", ".4g"),
    ("tokens/s", "train/tokens_per_second", ",.0f"),
    ("MFU", "train/mfu", ".1%"),
)
"""Name, metric and format of the values in a line."""


class LogLines(L.Callback):
    """Write a line for each logging interval, validation and checkpoint, to ``train.log`` and to standard error.

    A line of a logging interval has the step and the number of all steps, loss, learning rate, gradient norm before
    clipping, tokens per second, MFU if the device's peak is known, and the time left. The time left is estimated from
    the last intervals, with their validations. Where a terminal shows a progress bar, standard error gets the lines of
    validations only. Rank 0 alone writes. ``validate``, ``test`` and ``predict`` leave ``train.log`` alone.

    Args:
        terminal: Write all lines to standard error: true, false, or null for only where no terminal shows a bar.
        file: Write to ``train.log`` in the run's directory; a resumed run appends to it.
    """

    def __init__(self, terminal: bool | None = None, file: bool = True) -> None:
        self.terminal, self.file = terminal, file

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Not when training starts: a resumed run with no step left only makes a pending validation.
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks_of(trainer))
        self._has_bar = has_bar and get_console().is_terminal
        kept = self.file and stage == "fit" and not is_fast_dev_run(trainer)
        self._path = run_folder(trainer) / FILE if kept else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._times = deque([(trainer.global_step, time.monotonic())], maxlen=INTERVALS + 1)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_log_step(trainer):
            return
        metrics = trainer.callback_metrics  # on all ranks, because a value may be summed over ranks when it is read
        self._times.append((trainer.global_step, time.monotonic()))
        parts = [f"{name} {float(metrics[key]):{form}}" for name, key, form in VALUES if key in metrics]
        left = self._time_left(trainer)
        self.write_step(trainer, [*parts, *([f"{left} left"] if left else [])])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        perplexity = trainer.callback_metrics.get("val/perplexity")
        if perplexity is not None:
            self.write_step(trainer, [f"validation perplexity {float(perplexity):,.4f}"], beside_bar=True)

    def _time_left(self, trainer: L.Trainer) -> str | None:
        (first, began), (last, now) = self._times[0], self._times[-1]
        if last == first or trainer.max_steps < 0:
            return None
        return str(timedelta(seconds=round((trainer.max_steps - last) * (now - began) / (last - first))))

    def write_step(self, trainer: L.Trainer, parts: list[str], beside_bar: bool = False) -> None:
        """Write a line of a step.

        Args:
            trainer: The trainer.
            parts: What follows the step in the line.
            beside_bar: Write to standard error also where a terminal shows a progress bar.
        """
        of = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        self.write(trainer, " | ".join([f"step {trainer.global_step}{of}", *parts]), beside_bar)

    def write(self, trainer: L.Trainer, line: str, beside_bar: bool = False, shown: str | None = None) -> None:
        """Write a line to standard error and, with the time, to ``train.log``.

        Args:
            trainer: The trainer.
            line: The line.
            beside_bar: Write to standard error also where a terminal shows a progress bar.
            shown: What standard error gets in its place.
        """
        if not trainer.is_global_zero:
            return
        if (beside_bar or not self._has_bar) if self.terminal is None else self.terminal:
            print(line if shown is None else shown, file=sys.stderr, flush=True)
        if self._path is None or not line:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now().isoformat(timespec='seconds')} {line}\n")
        except OSError as error:  # a full disk does not end the run
            print(f"{self._path} cannot be written: {error}", file=sys.stderr, flush=True)


def write_lines(trainer: L.Trainer, lines: list[str]) -> None:
    """Write lines through the :class:`LogLines` of a trainer, also beside a progress bar.

    A trainer without one, as from Python, logs them as Lightning's own messages.
    """
    writers = [callback for callback in callbacks_of(trainer) if isinstance(callback, LogLines)]
    for writer in writers:
        for line in lines:
            writer.write(trainer, line, beside_bar=True)
    if not writers:
        rank_zero_info("\n".join(lines))


def write_table(trainer: L.Trainer, entries: list[tuple[str, str]]) -> None:
    """Write names and texts in two columns, as :func:`write_lines` does, wrapped to the width of a terminal."""
    writers = [callback for callback in callbacks_of(trainer) if isinstance(callback, LogLines)]
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else 0
    plain = in_columns(entries, width=0)
    for writer in writers:
        for entry, line in zip(_padded(entries), plain, strict=True):
            writer.write(trainer, line, beside_bar=True, shown="\n".join(in_columns([entry], width)))
    if not writers:
        rank_zero_info("\n".join(plain))


def _padded(entries: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Make the names of entries equally long, so that each can be laid out by itself."""
    longest = max((len(name) for name, _ in entries), default=0)
    return [(f"{name:<{longest}}", text) for name, text in entries]


def write_checkpoint_line(trainer: L.Trainer, path: str) -> None:
    """Write a line of a checkpoint through the :class:`LogLines` of a trainer, if it has one."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, LogLines):
            callback.write_step(trainer, [f"checkpoint {path}"])
