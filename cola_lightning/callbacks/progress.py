"""The progress bar."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
from rich import get_console
from rich.progress import BarColumn, ProgressColumn, Task
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from cola_lightning.private_apis.lightning import DescribedProgressBar

BAR, SPEED = 60, 120
"""Smallest widths at which the line has a bar, and the speed in micro-batches per second."""


class Progress(DescribedProgressBar):
    """Show optimizer steps of the whole run, where Lightning's bar shows micro-batches of an epoch.

    The bar is one line at any width: it is cut, not wrapped. Without a terminal there is no bar; ``LogLines`` writes
    lines instead.
    """

    @property  # type: ignore[override]  # of any class, where Lightning's has one of its own
    def progress(self) -> RichProgress | None:
        """The lines that Rich draws. Lightning makes them, and makes them anew for each part of a run."""
        return self._progress

    @progress.setter
    def progress(self, value: RichProgress | None) -> None:
        self._progress = value
        if value is not None:
            *others, metrics = value.columns
            for column in others:
                if isinstance(column, ProgressColumn):
                    vars(column)["get_table_column"] = lambda: Column(no_wrap=True)
            if isinstance(metrics, ProgressColumn):  # Rich makes it as narrow as the others require
                vars(metrics)["render"] = partial(_in_one_line, metrics.render)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not get_console().is_terminal:
            self.disable()

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Return the columns before the metrics, as far as the terminal has room for them."""
        columns, width = super().configure_columns(trainer), get_console().width
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = min(40, width // 10)
        text, bar, steps, clock, speed = columns
        return [text, *([bar] if width >= BAR else []), steps, clock, *([speed] if width >= SPEED else [])]

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.max_steps if self.trainer.max_steps > 0 else super().total_train_batches

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.teardown(trainer, pl_module, "fit")  # draws the bar for the last time, before the summary of the run

    def training_description(self) -> str:
        return f"{'Training':{len(self.validation_description)}}"  # as wide as validation's


def _in_one_line(render: Callable[[Task], Any], task: Task) -> Any:
    """Render a column as a text that is cut where its column ends."""
    text = render(task)
    if isinstance(text, Text):
        text.no_wrap, text.overflow = True, "ellipsis"
    return text
