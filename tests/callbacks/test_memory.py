import mmap
from pathlib import Path

import pytest
import torch

from cola_lightning.callbacks import Memory
from cola_lightning.callbacks.memory import STATM, resident_bytes
from tests.conftest import loader, tiny_trainer
from tests.processes import Run

SIZE = 64 * 2**20


def write_to_memory(out: str) -> None:
    """Write how much the resident set grew by 64 MiB that were mapped and written to."""
    before = resident_bytes()
    with mmap.mmap(-1, SIZE) as block:
        for page in range(0, SIZE, mmap.PAGESIZE):
            block[page] = 1
        Path(out, "grown").write_text(str(resident_bytes() - before))


@pytest.mark.skipif(not STATM.exists(), reason="/proc is Linux's")
@pytest.mark.distributed
def test_the_resident_set_holds_what_was_written_to(tmp_path):
    """In a process of its own, past the allocator, which in this one may have the memory already."""
    Run(write_to_memory, str(tmp_path), ranks=1, folder=tmp_path).done()
    assert int((tmp_path / "grown").read_text()) == pytest.approx(SIZE, rel=0.05)


@pytest.mark.skipif(not STATM.exists(), reason="/proc is Linux's")
def test_a_run_on_a_cpu_logs_the_hosts_memory_in_gib():
    run, model, batches = tiny_trainer(Memory(), steps=2)
    run.fit(model, loader(batches))
    assert float(run.callback_metrics["memory/host"]) == pytest.approx(resident_bytes() / 2**30, rel=0.2)
    assert not [name for name in run.callback_metrics if name.startswith("memory/") and name != "memory/host"]


class Device:
    """Stands for a CUDA device of which 5 GiB are reserved."""

    def __init__(self, monkeypatch):
        self.peak, self.resets = 3, 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 2**30)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * 2**30)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak * 2**30)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device):
        self.resets += 1


def test_on_cuda_the_peak_is_that_of_an_interval(monkeypatch):
    device, callback = Device(monkeypatch), Memory()
    run, model, batches = tiny_trainer(callback, steps=4, log_every_n_steps=2)
    # Only what the callback sees is CUDA; there may be none here.
    monkeypatch.setattr("cola_lightning.callbacks.memory.on_cuda", lambda trainer: True)
    run.fit(model, loader(batches))
    assert device.resets == 1 + 2  # as training begins, and at each log
    logged = {name: float(run.callback_metrics[f"memory/{name}"]) for name in ("allocated", "reserved", "peak")}
    assert logged == {"allocated": 2, "reserved": 5, "peak": 3}


@pytest.mark.gpu
def test_a_run_on_a_gpu_logs_all_three():
    import lightning as L

    _, model, batches = tiny_trainer(steps=2)
    run = L.Trainer(
        accelerator="gpu", devices=1, max_steps=2, max_epochs=1, logger=False, enable_checkpointing=False,
        log_every_n_steps=1, callbacks=[Memory()],
    )  # fmt: skip
    run.fit(model, loader(batches))
    values = run.callback_metrics
    assert 0 < values["memory/allocated"] <= values["memory/peak"] <= values["memory/reserved"]
