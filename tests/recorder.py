"""Record values of a run for its test."""

from collections.abc import Callable
from typing import Any

import lightning as L


class Recorder(L.Callback):
    """Keep what functions return at a hook of the training loop.

    ``Recorder(loss=loss)`` keeps ``loss(trainer, module, outputs, batch, batch_index)`` of every micro-batch in
    ``recorder.values["loss"]``, and the number of optimizer steps made by then in ``recorder.steps``.

    Args:
        hook: Name of the hook of a Lightning callback; its arguments are the functions'.
        functions: What to keep, by name.
    """

    def __init__(self, hook: str = "on_train_batch_end", /, **functions: Callable[..., Any]) -> None:
        self.steps: list[int] = []
        self.values: dict[str, list[Any]] = {name: [] for name in functions}

        def record(trainer: L.Trainer, *arguments: Any) -> None:
            self.steps.append(trainer.global_step)
            for name, function in functions.items():
                self.values[name].append(function(trainer, *arguments))

        setattr(self, hook, record)

    def by_step(self, name: str) -> dict[int, Any]:
        """Return the last value at each number of optimizer steps."""
        return dict(zip(self.steps, self.values[name], strict=True))


class Curve(L.Callback):
    """Keep the loss and the gradient norm of every step of this run. They are logged when the step has ended."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self._keep(trainer.callback_metrics)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep(trainer.callback_metrics)

    def _keep(self, metrics: dict[str, Any]) -> None:
        if "train/loss" in metrics:
            self.losses.append(float(metrics["train/loss"]))
            self.norms.append(float(metrics["train/gradient_norm"]))


def loss(trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> float:
    """Return the loss of a micro-batch."""
    return outputs["loss"].item()


def metrics(trainer: L.Trainer, *_: Any) -> dict[str, float]:
    """Return all metrics that are logged by now."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
