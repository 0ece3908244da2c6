"""Memory in use, on the device and on the host."""

import mmap
from pathlib import Path
from typing import Any

import lightning as L
import torch

from cola_lightning.host_memory import GIB
from cola_lightning.training.log_steps import at_log_step

STATM = Path("/proc/self/statm")


class Memory(L.Callback):
    """Log memory in GiB at each logging interval, of the rank that uses most.

    On CUDA: ``memory/allocated`` (tensors after the step), ``memory/reserved`` (all that PyTorch has reserved) and
    ``memory/peak`` (the most allocated since the last log). On Linux: ``memory/host``, the resident set of the process.
    None of these makes the host wait for the device.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if on_cuda(trainer):
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_log_step(trainer):
            return
        device = trainer.strategy.root_device
        values: dict[str, float] = {}
        if on_cuda(trainer):
            values["memory/allocated"] = torch.cuda.memory_allocated(device)
            values["memory/reserved"] = torch.cuda.memory_reserved(device)
            values["memory/peak"] = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        if STATM.exists():
            values["memory/host"] = resident_bytes()
        values = {name: value / GIB for name, value in values.items()}
        pl_module.log_dict(values, sync_dist=True, reduce_fx="max")


def on_cuda(trainer: L.Trainer) -> bool:
    """Return whether the run is on CUDA."""
    return trainer.strategy.root_device.type == "cuda"


def resident_bytes() -> int:
    """Return the resident set of this process in bytes, on Linux."""
    return int(STATM.read_text().split()[1]) * mmap.PAGESIZE
