"""Tokens seen, and tokens per second."""

import time
from typing import Any

import lightning as L
import torch

from cola_lightning.data.rows import IGNORE
from cola_lightning.module import at_log_step


class Throughput(L.Callback):
    """Logs ``train/tokens``, the tokens learnt from since the run began over all ranks (padding does not count, a
    resumed run goes on counting), and ``train/tokens_per_second``, the same over the time since the last log.

    Lightning's own ThroughputMonitor waits for the device at every step; here it is asked on the logging interval only.
    Validation is outside the clock.
    """

    def __init__(self) -> None:
        self.tokens = 0  # up to the last log
        self._since: torch.Tensor | int = 0
        self._started = self._paused = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "since": int(self._since)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self._since = state_dict["tokens"], state_dict["since"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started += time.perf_counter() - self._paused

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._since = self._since + (batch["labels"][:, 1:] != IGNORE).sum()
        if not at_log_step(trainer):
            return
        seen = int(trainer.strategy.reduce(self._since.double(), reduce_op="sum"))
        now = time.perf_counter()
        self.tokens += seen
        pl_module.log("train/tokens", float(self.tokens))
        speed = seen / (now - self._started)
        pl_module.log("train/tokens_per_second", speed)
        pl_module.log("tok/s", speed, prog_bar=True, logger=False)
        self._since, self._started = 0, now
