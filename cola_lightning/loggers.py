"""TensorBoard's events, written by a run that a full disk must not end."""

import threading
from collections.abc import Callable
from contextlib import suppress

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_warn
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

SECONDS_TO_CLOSE = 30.0


class FaultTolerantTensorBoardLogger(TensorBoardLogger):
    """Lightning's logger, but where events cannot be written they are lost, with a warning, and the run goes on.

    Arguments are those of Lightning's TensorBoardLogger.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        writer = super().experiment
        events = writer.file_writer if isinstance(writer, SummaryWriter) else None  # None once it is closed
        if events is not None and not isinstance(events.event_writer, FaultTolerantWriter):
            events.event_writer = FaultTolerantWriter(events.event_writer)
        return writer


class FaultTolerantWriter:
    """Stands before TensorBoard's writer, which never writes again after an error: after each there is a new one, and
    a new file in the same folder, which TensorBoard reads as the rest of the run."""

    def __init__(self, writer: EventFileWriter) -> None:
        self.writer, self.told = writer, False

    def get_logdir(self) -> str:
        return self.writer.get_logdir()

    def add_event(self, event: Event) -> None:
        self._try(lambda: self.writer.add_event(event))

    def flush(self) -> None:
        self._try(self.writer.flush)

    def close(self) -> None:
        """Close the file, but wait no longer than ``SECONDS_TO_CLOSE``: TensorBoard's thread may be stuck on a disk
        that does not answer, or gone, and the run is over."""
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
            if not self.told:
                self.told = True
                rank_zero_warn(f"TensorBoard's events of {folder} cannot be written ({error}); some are lost")
            with suppress(OSError):  # the old one goes on failing then, and the next event tries anew
                self.writer = EventFileWriter(folder)
