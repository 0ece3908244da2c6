"""Twenty steps under one strategy, as a program: ``parity_run.py STRATEGY DEVICES OUT KEEP...``.

Global batch, seed and data are the same whatever the strategy. For each way of checkpointing (CoLA-M's ``keep``, or
none), and each other method that trains under every strategy, the losses and the gradient norms before clipping are
written to OUT as JSON.
"""

import json
import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.data import Dataset

from cola_lightning.callbacks import CoLAM, CRNetRecompute
from cola_lightning.data.loader import TrainLoader
from cola_lightning.methods import CoLA, CRNet, LaX, LoRA, SLTrain
from cola_lightning.module import LanguageModel
from cola_lightning.optim import WarmupCosine

STEPS, GLOBAL_BATCH, CLIP = 20, 8, 0.5
METHODS = {
    "lora": partial(LoRA, rank=8, dropout=0),
    "sltrain": partial(SLTrain, rank=8, sparsity=0.1),
    "lax": partial(LaX, rank=8, gate=1.0),
    "cr_net": partial(CRNet, rank=8),
}
CALLBACKS = {"none": [], "cr_net": [CRNetRecompute(anchor_every=2)]}


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """Lightning admits DeepSpeed on CUDA only, though it runs on the CPU: its checks of the device are left out."""

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        engine, optimizer, _, _ = deepspeed.initialize(
            args=Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, optimizer


class Rows(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = 1 + (7 * index + torch.arange(24) * (1 + index % 3)) % 63
        return {"input_ids": ids, "labels": ids}


class Data(L.LightningDataModule):
    def train_dataloader(self):
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        replicas = ranks["num_replicas"]
        return TrainLoader(Rows(), GLOBAL_BATCH // replicas, STEPS, seed=1, replicas=replicas, rank=ranks["rank"])


class Curve(L.Callback):
    def __init__(self):
        self.losses, self.norms = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.note(trainer)

    def on_train_end(self, trainer, pl_module):
        self.note(trainer)

    def note(self, trainer):
        """The values of the step before, which are logged when it has ended."""
        if trainer.global_step:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.norms.append(float(trainer.callback_metrics["train/gradient_norm"]))


def train(strategy: str, devices: int, keep: str) -> Curve:
    if strategy.startswith("deepspeed"):
        strategy = DeepSpeedOnCPU(
            stage=int(strategy[-1]), process_group_backend="gloo", logging_batch_size_per_gpu=GLOBAL_BATCH // devices
        )
    curve = Curve()
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=STEPS, max_epochs=1, log_every_n_steps=1,
        gradient_clip_val=CLIP, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[curve, *CALLBACKS.get(keep, [] if keep in METHODS else [CoLAM(keep)])],
    )  # fmt: skip
    L.seed_everything(0)
    model = LanguageModel(
        64, 32, 48, 3, 4,
        projection=METHODS.get(keep, partial(CoLA, rank=8)),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        schedule=partial(WarmupCosine, warmup_steps=5),
    )  # fmt: skip
    trainer.fit(model, datamodule=Data())
    return curve


def main(strategy: str, devices: str, out: str, *keeps: str) -> None:
    torch.set_num_threads(1)
    curves = {keep: train(strategy, int(devices), keep) for keep in keeps}
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Path(out).write_text(json.dumps({keep: [curve.losses, curve.norms] for keep, curve in curves.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
