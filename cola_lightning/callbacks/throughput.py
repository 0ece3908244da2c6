"""Tokens seen, tokens per second, and how much of the device and of the time they took."""

import time
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch._subclasses.fake_tensor import FakeTensorMode

from cola_lightning.data.rows import IGNORE
from cola_lightning.module import LanguageModel, at_log_step

FETCH = "[_TrainingEpochLoop].train_dataloader_next"
"""What Lightning tells its profiler that it does while it takes the next batch from the loader."""


class Throughput(L.Callback):
    """Logs ``train/tokens``, the tokens learnt from since the run began over all ranks (padding does not count, a
    resumed run goes on counting), ``train/tokens_per_second``, the same over the time since the last log, and
    ``train/data_wait``, the share of that time in which a rank waited for its next batch.

    Where the device's peak is known, also ``train/mfu`` and ``train/hfu``, the shares of the peak that went into the
    FLOPs that the network needs (forward and backward, PaLM's definition, arXiv 2204.02311) and into those that were
    carried out, what activation checkpointing does again included; and ``train/tflops_per_device``, the former's FLOPs.
    These count all positions, padded ones too, for the device computes them.

    Lightning's own ThroughputMonitor waits for the device at every step; here it is asked on the logging interval only.
    Validation is outside the clock.

    Args:
        peak_tflops: Peak of one device in the run's precision, in TFLOP/s, dense. If not given, it is looked up for
            NVIDIA GPUs; for a CPU there is none to look up.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak_tflops = peak_tflops
        self.tokens = 0  # up to the last log
        self._since: torch.Tensor | int = 0
        self._positions = 0
        self._started = self._paused = 0.0
        self._fetches: _Fetches | None = None
        self._flops: tuple[float, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "since": int(self._since)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self._since = state_dict["tokens"], state_dict["since"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.profiler = self._fetches = _Fetches(trainer.profiler)
        self._peak = self.peak_tflops * 1e12 if self.peak_tflops else peak_flops(trainer)
        self._started = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.profiler = self._fetches.profiler

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started += time.perf_counter() - self._paused

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._since = self._since + (batch["labels"][:, 1:] != IGNORE).sum()
        self._positions += batch["input_ids"].numel()
        if not at_log_step(trainer):
            return
        waited = self._fetches.take()
        sums = torch.stack(
            (self._since.double(), *self._since.new_tensor([self._positions, waited], dtype=torch.double))
        )
        seen, positions, waited = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        now = time.perf_counter()
        seconds = now - self._started
        self.tokens += int(seen)
        speed = seen / seconds
        pl_module.log("train/tokens", float(self.tokens))
        pl_module.log("train/tokens_per_second", speed)
        pl_module.log("tok/s", speed, prog_bar=True, logger=False)
        pl_module.log("train/data_wait", waited / seconds / trainer.world_size)
        if self._peak:
            if self._flops is None:
                self._flops = flops_per_token(pl_module, batch["input_ids"].shape[1])
                now = time.perf_counter()  # counting takes a moment
            model, hardware = (flops * positions / seconds / trainer.world_size for flops in self._flops)
            pl_module.log("train/tflops_per_device", model / 1e12)
            pl_module.log("train/mfu", model / self._peak)
            pl_module.log("train/hfu", hardware / self._peak)
        self._since, self._positions, self._started = 0, 0, now


class _Fetches:
    """Stands before the trainer's profiler, which alone hears when a fetch begins, and adds their seconds up."""

    def __init__(self, profiler: Any) -> None:
        self.profiler, self.seconds, self._began = profiler, 0.0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.profiler, name)

    def start(self, action: str) -> None:
        if action == FETCH:
            self._began = time.perf_counter()
        self.profiler.start(action)

    def stop(self, action: str) -> None:
        self.profiler.stop(action)
        if action == FETCH:
            self.seconds += time.perf_counter() - self._began

    def take(self) -> float:
        """Seconds since it was last asked."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def flops_per_token(module: LanguageModel, sequence_length: int) -> tuple[float, float]:
    """FLOPs of a training step for one token of a row of ``sequence_length``: what the network needs, and what is
    carried out with the module's ``transforms`` (checkpointing). Counted on tensors without content, on one layer and
    on two; attention counts as if it were not causal."""
    return _count(module, sequence_length, transformed=False), _count(module, sequence_length, transformed=True)


def _count(module: LanguageModel, sequence_length: int, transformed: bool) -> float:
    from cola_lightning.benchmark import count_flops  # which imports the callbacks

    def step(layers: int) -> float:
        with FakeTensorMode():
            network = module.build()
            count = len(network.model.layers)
            network.model.layers = network.model.layers[:layers]
            for transform in module.transforms if transformed else []:
                transform(network)
            ids = torch.zeros(1, sequence_length, dtype=torch.long)
            counted = count_flops(lambda: network(ids).sum().backward())
        return counted, count

    (one, count), (two, _) = step(1), step(2)
    return (one + (count - 1) * (two - one)) / sequence_length


def peak_flops(trainer: L.Trainer) -> float | None:
    """Peak of the device in the run's precision, in FLOP/s; None where it is not known."""
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return None
    half = trainer.precision.startswith(("bf16", "16"))
    return get_available_flops(device, torch.bfloat16 if half else torch.float32)
