"""Texts and pictures, to whatever loggers a run has; scalars go by ``log`` as everywhere."""

from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def write_text(trainer: L.Trainer, name: str, text: str) -> None:
    """A text under ``name`` at the present step."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, text, trainer.global_step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(name, columns=["step", "text"], data=[[trainer.global_step, text]])


@rank_zero_only
def write_figure(trainer: L.Trainer, name: str, figure: Any) -> None:
    """A matplotlib figure under ``name`` at the present step; it is closed."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, trainer.global_step, close=False)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [figure])
