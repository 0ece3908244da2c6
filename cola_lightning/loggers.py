"""The TensorBoard logger of a run, which a full disk does not end; and texts and figures for TensorBoard and W&B."""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

SECONDS_TO_CLOSE = 30.0
"""Seconds that a run waits at its end for TensorBoard's last events to be written."""


def read_scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """Read what a run has logged, by tag and step. Of a step that was made twice, the last value counts."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


class FaultTolerantTensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoardLogger, for a run that goes on if events cannot be written: they are lost, with a warning.

    Arguments are those of Lightning's TensorBoardLogger.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        writer = super().experiment
        events = writer.file_writer if isinstance(writer, SummaryWriter) else None  # it is None after closing
        if events is not None and not isinstance(events.event_writer, FaultTolerantWriter):
            events.event_writer = FaultTolerantWriter(events.event_writer)
        return writer


class FaultTolerantWriter:
    """Replace TensorBoard's writer after each error, because it never writes again after one.

    The new writer opens a new file in the same folder, which TensorBoard reads as the rest of the run.

    Args:
        writer: The first writer.
    """

    def __init__(self, writer: EventFileWriter) -> None:
        self.writer, self.warned = writer, False

    def get_logdir(self) -> str:
        return self.writer.get_logdir()

    def add_event(self, event: Event) -> None:
        self._try(lambda: self.writer.add_event(event))

    def flush(self) -> None:
        self._try(self.writer.flush)

    def close(self) -> None:
        """Close the file, within ``SECONDS_TO_CLOSE``.

        TensorBoard's thread may hang on a disk that does not answer, and the run must end nevertheless.
        """
        closing = threading.Thread(target=self._try, args=(self.writer.close,), daemon=True)
        closing.start()
        closing.join(SECONDS_TO_CLOSE)
        if closing.is_alive():
            rank_zero_warn(f"TensorBoard's events of {self.writer.get_logdir()} could not be closed; some may be lost")

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            folder = self.writer.get_logdir()
            if not self.warned:
                self.warned = True
                rank_zero_warn(f"TensorBoard's events of {folder} cannot be written ({error}); some are lost")
            with suppress(OSError):  # the next event tries again
                self.writer = EventFileWriter(folder)


@rank_zero_only
def write_text(trainer: L.Trainer, name: str, text: str) -> None:
    """Log a text under ``name`` at the present step, to TensorBoard and W&B."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, text, trainer.global_step)
        elif isinstance(logger, WandbLogger):
            row: list[Any] = [trainer.global_step, text]
            logger.log_text(name, columns=["step", "text"], data=[row])


@rank_zero_only
def write_figure(trainer: L.Trainer, name: str, figure: Any) -> None:
    """Log a matplotlib figure under ``name`` at the present step, to TensorBoard and W&B."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, trainer.global_step, close=False)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [figure])
