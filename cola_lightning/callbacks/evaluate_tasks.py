"""Scores of lm-eval's tasks during training."""

from pathlib import Path
from typing import cast

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from cola_lightning.errors import InputError, check_at_least
from cola_lightning.inference.evaluate import evaluate_tasks, find_tasks
from cola_lightning.inference.load import LoadedModel
from cola_lightning.private_apis.lightning import logged_step
from cola_lightning.training.module import LanguageModel
from cola_lightning.training.trainer_attributes import datamodule_of


class EvaluateTasks(L.Callback):
    """Score the model by lm-eval's tasks after every validation, and log ``tasks/TASK/MEASURE``.

    Rank 0 scores, and the others wait. Random numbers go on as if nothing had been scored. It needs
    ``pip install 'cola-lightning[eval]'``, memory for a second copy of the network, and one device or DDP, because the
    other strategies divide the network between ranks.

    Args:
        tasks: Names of tasks.
        include_path: Folder with task files of one's own.
        limit: Examples of each task; null for all.
        batch_size: Examples at a time.

    Raises:
        InputError: If there is no task, or a number is below 1; before training starts, if lm-eval is not installed or
            knows no such task, or the strategy divides the network.
    """

    def __init__(
        self, tasks: list[str], include_path: str | None = None, limit: int | None = None, batch_size: int = 8
    ) -> None:
        if not tasks:
            raise InputError("EvaluateTasks: tasks is empty; name at least one")
        check_at_least(1, "EvaluateTasks: ", limit=limit, batch_size=batch_size)
        if include_path is not None and not Path(include_path).is_dir():
            raise InputError(f"EvaluateTasks: include_path {include_path} is no folder; name one with task files")
        self.tasks, self.include_path, self.limit, self.batch_size = tasks, include_path, limit, batch_size

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise InputError(
                "EvaluateTasks needs the whole network on a rank; take --trainer.strategy ddp, or leave it out"
            )
        find_tasks(self.tasks, self.include_path)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if trainer.is_global_zero:
            with isolate_rng():  # lm-eval seeds all generators
                scores = self._score(trainer, cast(LanguageModel, pl_module))
            for logger in trainer.loggers:
                logger.log_metrics(scores, step=logged_step(trainer))
            shown = ", ".join(f"{name.removeprefix('tasks/')} {value:.4f}" for name, value in scores.items())
            rank_zero_info(f"tasks after {trainer.global_step:,} steps: {shown}")
        trainer.strategy.barrier()

    def _score(self, trainer: L.Trainer, module: LanguageModel) -> dict[str, float]:
        tokenizer = datamodule_of(trainer).tokenizer
        found = evaluate_tasks(
            LoadedModel(module.network, Path()),
            tokenizer,
            self.tasks,
            self.include_path,
            self.limit,
            self.batch_size,
            trainer.strategy.root_device,
        )
        return {
            f"tasks/{task}/{name}": value
            for task, scores in found.items()
            for name, value in scores.items()
            if name != "sample_len"  # the number of examples
        }
