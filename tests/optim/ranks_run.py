"""Ten steps with each optimizer of whole matrices, on one rank or two: the losses, and whether weights differ."""

import json
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from torch.optim import AdamW, Muon

from cola_lightning.optim import APOLLO, Fira, GaLore, HybridOptimizer, WarmupCosine
from cola_lightning.training.module import LanguageModel
from tests.distributed.parity_run import GLOBAL_BATCH, Data
from tests.recorder import Curve

MATRICES = {
    "GaLore": partial(GaLore, lr=0.05, rank=4, update_proj_gap=3),
    "Fira": partial(Fira, lr=0.01, rank=4, update_proj_gap=3),
    "APOLLO": partial(APOLLO, lr=0.01, rank=4, update_proj_gap=3),
    "Muon": partial(Muon, lr=0.02),
}


def train(name: str, devices: int) -> dict:
    curve = Curve()
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=10, max_epochs=1,
        log_every_n_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[curve],
    )  # fmt: skip
    L.seed_everything(0)
    model = LanguageModel(
        64, 32, 48, 2, 4,
        optimizer=partial(HybridOptimizer, matrix=MATRICES[name], other=partial(AdamW, lr=0.01)),
        schedule=partial(WarmupCosine, warmup_steps=2),
    )  # fmt: skip
    trainer.fit(model, datamodule=Data(GLOBAL_BATCH // devices))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    theirs = weights.clone()
    if devices > 1:
        dist.broadcast(theirs, 0)
        differ = torch.tensor(float(not torch.equal(weights, theirs)))
        dist.all_reduce(differ)
        return {"losses": curve.losses, "ranks_differ": bool(differ)}
    return {"losses": curve.losses, "ranks_differ": False}


def train_all(file: str) -> None:
    """Train on two ranks with every optimizer, as each of them; rank 0 writes the file."""
    torch.set_num_threads(1)
    results = {name: train(name, 2) for name in MATRICES}
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(results))
