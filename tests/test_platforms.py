"""Simulate what Windows and macOS lack: no machine of either was at hand."""

import os
import re
import subprocess
import sys

import pytest
import torch

from cola_lightning import __main__ as entry
from cola_lightning.distributed.precision import widest_float
from cola_lightning.training.metrics import Perplexity
from tests.conftest import REPOSITORY

# Libraries are imported before, because they choose their own ways by the system that they are on.
WITHOUT_UNIX = """
import os, signal, sys
import datasets, fsspec.implementations.http, huggingface_hub, lightning.pytorch.cli, pyarrow.parquet, pydantic
import rich.progress, tensorboard.summary, tokenizers, torch._dynamo, torch.distributed.checkpoint
import torch.distributed.fsdp, torch.profiler, torch.utils.tensorboard
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

for module in ("fcntl", "resource", "termios", "pwd", "grp", "deepspeed"):
    sys.modules[module] = None
for owner, names in {
    signal: ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGALRM", "alarm", "sigwaitinfo", "pthread_sigmask"),
    os: ("fork", "register_at_fork", "sysconf", "pwrite", "O_CLOEXEC", "killpg", "setsid"),
}.items():
    for name in names:
        delattr(owner, name)
sys.platform = "win32"
from cola_lightning.__main__ import main
main()
print("trained")
sys.argv += ["--trainer.strategy=deepspeed_stage_2", "--run_dir=other"]
main()
"""


@pytest.mark.slow
def test_a_run_needs_nothing_that_windows_lacks(tiny_run, tmp_path):
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_UNIX, "fit", *tiny_run, f"--run_dir={run}", "--data.num_workers=0"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("trained\n"), done.stderr[-3000:]
    assert "step 6/6" in done.stderr
    assert done.returncode == 2
    assert re.fullmatch("(?i)error: .*deepspeed.*", done.stderr.splitlines()[-1])
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 6


def test_sums_take_a_type_that_the_device_has():
    assert widest_float(torch.device("mps")) is torch.float32
    assert widest_float(torch.device("cpu")) is widest_float(torch.device("cuda")) is torch.float64

    def move_to_mps(tensor):
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return tensor.clone()

    metric = Perplexity()._apply(move_to_mps)
    metric.reset()
    metric.update(torch.tensor(3.0), torch.tensor(2))
    assert metric.loss_sum.dtype == torch.float32
    assert float(metric.compute()) == pytest.approx(4.481689)  # exp(3 / 2)


@pytest.mark.parametrize(
    ("system", "set_before", "found"), [("darwin", None, "1"), ("darwin", "0", "0"), ("linux", None, None)]
)
def test_on_macos_operators_that_its_gpu_lacks_run_on_the_cpu(system, set_before, found, monkeypatch, capsys):
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)
    if set_before:
        monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", set_before)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(sys, "argv", ["cola_lightning", "--help"])
    entry.main()
    assert os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == found
    os.environ.pop("PYTORCH_ENABLE_MPS_FALLBACK", None)
