"""Tokens, tokens per second, the share of the device's peak (MFU), and the time spent waiting for data."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from typing_extensions import TypedDict

from cola_lightning.costs import Flops, Run, gpu_reported
from cola_lightning.data.packing import IGNORE
from cola_lightning.distributed.precision import widest_float
from cola_lightning.private_apis.lightning import FETCH
from cola_lightning.stored_data import ALTERED, Count, check_stored
from cola_lightning.training.log_steps import at_log_step
from cola_lightning.training.module import LanguageModel


class _State(TypedDict):
    tokens: Count


class Throughput(L.Callback):
    """Log throughput at each logging interval. Validation does not count into the time.

    - ``train/tokens``: tokens that all ranks learnt from since the run began, without padding. A resumed run goes on
      counting.
    - ``train/tokens_per_second``: tokens since the last log, by the time since then.
    - ``train/data_wait``: the share of that time in which a rank waited for its next batch.

    If the device's peak is known:

    - ``train/mfu``: the share of the peak for the FLOPs of forward and backward (PaLM, arXiv 2204.02311).
    - ``train/hfu``: the same with the FLOPs that activation checkpointing recomputes.
    - ``train/tflops_per_device``: the FLOPs of ``train/mfu``, in TFLOP/s.

    FLOPs count padded positions too, because the device computes them. Lightning's ThroughputMonitor waits for the
    device at every step; this callback waits at logging steps only.

    Args:
        peak_tflops: Peak of one device in TFLOP/s. If not given, the dense bf16 peak of the GPU in the table of
            ``estimate``, at any precision. The table has no CPUs.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak_tflops = peak_tflops
        self.tokens = 0  # of all ranks, up to the last log
        self._since = torch.zeros((), dtype=torch.int64)  # of this rank, since then
        self._carried = 0  # of all ranks, before this process: not part of its speed
        self._sum: Callable[[torch.Tensor], torch.Tensor] = lambda tokens: tokens  # over the ranks
        self._device = torch.device("cpu")
        self._positions = 0
        self._started = self._paused = 0.0
        self._fetches: _Fetches | None = None
        self._flops: Flops | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the count of all ranks, which all call this. Every rank of a resumed run loads it."""
        since = int(self._sum(self._since.to(self._device, widest_float(self._device))))
        return {"tokens": self.tokens + self._carried + since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_stored(state_dict, _State, "in the state of Throughput", ALTERED)
        self.tokens, self._carried = 0, state_dict["tokens"]
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._since, self._positions, self._started = torch.zeros_like(self._since), 0, time.perf_counter()
        if self._fetches is not None:
            self._fetches.take()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device
        self._sum = partial(trainer.strategy.reduce, reduce_op="sum")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        owner: Any = trainer  # which does not declare its profiler
        owner.profiler = self._fetches = _Fetches(owner.profiler)
        self._peak = self.peak_tflops * 1e12 if self.peak_tflops else peak_flops(trainer.strategy.root_device)
        self._started = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        owner: Any = trainer
        if self._fetches is not None:
            owner.profiler = self._fetches.profiler

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started += time.perf_counter() - self._paused

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        tokens = (batch["labels"][:, 1:] != IGNORE).sum()
        self._since = self._since.to(tokens.device) + tokens
        self._positions += batch["input_ids"].numel()
        if not at_log_step(trainer):
            return
        waited = self._fetches.take() if self._fetches is not None else 0.0
        dtype = widest_float(self._since.device)
        sums = torch.stack((self._since.to(dtype), *self._since.new_tensor([self._positions, waited], dtype=dtype)))
        seen, positions, waited = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        now = time.perf_counter()
        seconds = now - self._started
        self.tokens, self._carried = self.tokens + self._carried + int(seen), 0
        speed = seen / seconds
        pl_module.log("train/tokens", float(self.tokens))
        pl_module.log("train/tokens_per_second", speed)
        pl_module.log("tok/s", speed, prog_bar=True, logger=False)
        pl_module.log("train/data_wait", waited / seconds / trainer.world_size)
        if self._peak:
            if self._flops is None:
                self._flops = flops_per_token(cast(LanguageModel, pl_module), batch["input_ids"].shape[1])
                now = time.perf_counter()  # without the time that counting takes
            rate = positions / seconds / trainer.world_size
            pl_module.log("train/tflops_per_device", self._flops.model * rate / 1e12)
            pl_module.log("train/mfu", self._flops.model * rate / self._peak)
            pl_module.log("train/hfu", self._flops.hardware * rate / self._peak)
        self._since, self._positions, self._started = torch.zeros_like(self._since), 0, now


class _Fetches:
    """Wrap the trainer's profiler, and add up the seconds of fetching batches, which Lightning reports only to it."""

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
        """Return the seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def flops_per_token(module: LanguageModel, sequence_length: int) -> Flops:
    """Count the FLOPs of a training step for one token of a row of ``sequence_length``, with recomputation."""
    layers, transforms = module.config.num_hidden_layers, tuple(module.transforms)
    run = Run(module.build, layers, module.make_optimizer, 1, sequence_length, transforms)
    row = run.flops
    return Flops(row.forward / sequence_length, row.backward / sequence_length, row.recomputed / sequence_length)


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a device in FLOP/s; None if it is not known."""
    gpu = gpu_reported(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.peak * 1e12 if gpu else None
