"""Runs of test_sharded.py: ReLoRA, SwitchLoRA and SST under FSDP2, on ranks that ``tests.processes`` starts."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from torch.optim import AdamW

from cola_lightning.callbacks import Checkpoints
from cola_lightning.methods import (
    SST,
    CoLAM,
    ReLoRA,
    ReLoRACallback,
    SSTCallback,
    SwitchLoRA,
    SwitchLoRACallback,
)
from cola_lightning.optim import RowAdamW, WarmupCosine, WarmupCosineRestarts
from cola_lightning.training.module import LanguageModel
from tests.distributed.parity_run import GLOBAL_BATCH, STEPS, Data
from tests.recorder import Curve

RANK = 6  # on 4 ranks, the last has no row of A


class RegularSST(SST):
    """Starts with singular values that stay above zero. The vectors of values of zero depend on rounding."""

    @torch.no_grad()
    def reset_parameters(self):
        super().reset_parameters()
        self.sigma.add_(0.5)


class Method(NamedTuple):
    projection: Callable
    callback: Callable[[], L.Callback]
    optimizer: Callable = AdamW


METHODS = {  # a cycle has 5 steps, so that the checkpoint of step 10 is written just after a decomposition of SST
    "relora": Method(partial(ReLoRA, rank=RANK, dropout=0), partial(ReLoRACallback, prune_ratio=0.5)),
    "relora_magnitude": Method(
        partial(ReLoRA, rank=RANK, dropout=0), partial(ReLoRACallback, reset="magnitude", prune_ratio=0.5)
    ),
    "switch_lora": Method(partial(SwitchLoRA, rank=RANK), partial(SwitchLoRACallback, 4, 1.0, hold_steps=2), RowAdamW),
    "sst": Method(partial(RegularSST, rank=RANK), partial(SSTCallback, iterations_per_round=2)),
}


def train(
    name: str, strategy: str, ranks: int, out: str, micro_batch: int, resume: str | None = None, recompute: bool = False
) -> None:
    """Train for twenty steps, and write the curve to OUT/curve.json and checkpoints of steps 10 and 20.

    ``strategy`` ends in ``32`` for float32; otherwise the run is in float64.
    """
    method, curve = METHODS[name], Curve()
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy.removesuffix("32"), max_steps=STEPS, max_epochs=1,
        accumulate_grad_batches=GLOBAL_BATCH // (ranks * micro_batch), log_every_n_steps=1, gradient_clip_val=0.5,
        precision="32-true" if strategy.endswith("32") else "64-true",
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            curve, method.callback(), Checkpoints(10, dirpath=out, minutes_at_end=0),
            *([CoLAM("block_input")] if recompute else []),
        ],
    )  # fmt: skip
    L.seed_everything(0, verbose=False)
    restarts = partial(WarmupCosineRestarts, warmup_steps=2, cycle_steps=5, restart_warmup_steps=1)
    model = LanguageModel(
        64, 16, 24, 2, 2,
        projection=method.projection, optimizer=partial(method.optimizer, lr=0.02),
        schedule=partial(WarmupCosine, warmup_steps=3) if name == "switch_lora" else restarts,
    )  # fmt: skip
    trainer.fit(model, datamodule=Data(micro_batch), ckpt_path=resume, weights_only=True)
    if trainer.is_global_zero:
        Path(out, "curve.json").write_text(json.dumps([curve.losses, curve.norms]))


def train_all(jobs: list[tuple], ranks: int, out: str) -> None:
    """Train in OUT/STRATEGY/NAME for each job: method, strategy, micro-batch, checkpoint to continue from, CoLA-M."""
    torch.set_num_threads(1)
    for name, strategy, micro_batch, resume, recompute in jobs:
        train(name, strategy, ranks, f"{out}/{strategy}/{name}", micro_batch, resume, recompute)
