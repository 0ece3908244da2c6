"""The same curve under every strategy, in two real processes that talk by gloo, with CoLA-M and without.

FSDP of the first generation runs on GPUs only.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, StrategyRegistry

from cola_lightning.models.llama import Block
from tests.parity_run import CLIP, METHODS, STEPS

PROGRAM = Path(__file__).parent / "parity_run.py"
KEEPS = ["none", "residual_and_latents", "latents"]


@cache
def curves(strategy: str, devices: int) -> dict[str, list[list[float]]]:
    """For each way of checkpointing, and each other method, the losses and the gradient norms."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "curves.json"
        command = [sys.executable, str(PROGRAM), strategy, str(devices), str(out), *KEEPS, *METHODS]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
        environment["PYTHONPATH"] = str(PROGRAM.parent.parent)
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(out.read_text())


@pytest.mark.parametrize("keep", [*KEEPS, *METHODS])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_1", "deepspeed_2", "deepspeed_3"])
def test_two_processes_give_the_curve_of_one(strategy, keep):
    losses, norms = curves(strategy, 2)[keep]
    expected_losses, expected_norms = curves("auto", 1)[keep if keep in METHODS else "none"]
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-5, abs=1e-5)


def test_clipping_is_at_work_and_the_model_learns():
    losses, norms = curves("auto", 1)["none"]
    assert sum(norm > CLIP for norm in norms) >= STEPS / 2
    assert losses[-1] < losses[0] - 0.5


def test_bare_fsdp_wraps_decoder_layers():
    strategy = StrategyRegistry.get("fsdp")
    assert isinstance(strategy, FSDPStrategy)
    assert set(strategy.kwargs["auto_wrap_policy"]._module_classes) == {Block}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FSDP needs a GPU")
def test_fsdp_trains_and_clips_on_a_gpu(tmp_path):
    import lightning as L

    from tests.conftest import loader, tiny_trainer

    _, model, batches = tiny_trainer(steps=3)
    trainer = L.Trainer(
        accelerator="gpu", devices=1, strategy="fsdp", max_steps=3, max_epochs=1, gradient_clip_val=0.5, logger=False,
        enable_checkpointing=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model, loader(batches))
    assert trainer.callback_metrics["train/gradient_norm"] > 0
