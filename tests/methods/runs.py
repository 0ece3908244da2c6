"""Tiny runs of the methods. Global batch, seed and data are the same whatever the strategy."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import AdamW

from cola_lightning.callbacks import StepSeed
from cola_lightning.data.row_loader import TrainLoader
from cola_lightning.methods import (
    SST,
    LoRA,
    ReLoRA,
    ReLoRACallback,
    SLTrain,
    SSTCallback,
    SwitchLoRA,
    SwitchLoRACallback,
)
from cola_lightning.optim import RowAdamW, WarmupCosine, WarmupCosineRestarts
from cola_lightning.training.module import LanguageModel
from tests.distributed.parity_run import Rows
from tests.recorder import Curve

STEPS, CYCLE = 12, 4
SIZES = (64, 32, 48, 2, 4)


class Method(NamedTuple):
    projection: Callable
    callbacks: Callable[[], list[L.Callback]] = list
    optimizer: Callable = AdamW
    schedule: Callable = partial(WarmupCosine, warmup_steps=2)
    comparable_steps: int = STEPS


restarts = partial(WarmupCosineRestarts, warmup_steps=2, cycle_steps=CYCLE, restart_warmup_steps=1)
METHODS = {
    "lora": Method(partial(LoRA, rank=8, dropout=0)),
    "lora_dropout": Method(partial(LoRA, rank=8, dropout=0.1), lambda: [StepSeed()]),
    "sltrain": Method(partial(SLTrain, rank=8, sparsity=0.1)),
    "relora": Method(partial(ReLoRA, rank=8, dropout=0), lambda: [ReLoRACallback()], schedule=restarts),
    # Often enough that every factor has exchanges in twelve steps, and rows are left because they are held.
    "switch_lora": Method(
        partial(SwitchLoRA, rank=8), lambda: [SwitchLoRACallback(4, 1.0, hold_steps=2)], optimizer=RowAdamW
    ),
    # A decomposition leaves the function as it was, but values of zero have whatever vectors: what these do when they
    # train cannot be compared.
    "sst": Method(partial(SST, rank=8), lambda: [SSTCallback(iterations_per_round=2)], AdamW, restarts, 2 * CYCLE + 1),
}


def copy_weights(trainer: L.Trainer, module: L.LightningModule, *_: Any) -> dict[str, Tensor]:
    """Return a copy of the weights, for a ``Recorder``."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


class Data(L.LightningDataModule):
    """Goes on after a stop at the next row."""

    loader: TrainLoader
    position = 0

    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        replicas = ranks["num_replicas"]
        self.loader = TrainLoader(
            Rows(),
            self.batch_size // replicas,
            100,
            seed=1,
            position=self.position,
            replicas=replicas,
            rank=ranks["rank"],
        )
        return self.loader

    def state_dict(self):
        return {"position": self.loader.position}

    def load_state_dict(self, state_dict):
        self.position = state_dict["position"]


class Result(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]
    trainer: L.Trainer
    model: LanguageModel


def train(
    method: str,
    strategy: Any = "auto",
    devices: int = 1,
    callbacks: Iterable[L.Callback] = (),
    steps: int = STEPS,
    resume: Path | None = None,
    lr: float = 0.01,
    optimizer: Callable | None = None,
    batch_size: int = 8,
    **trainer: Any,
) -> Result:
    projection, make_callbacks, own_optimizer, schedule, _ = METHODS[method]
    optimizer = optimizer or own_optimizer
    curve, callbacks = Curve(), list(callbacks)
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings = {"precision": "32-true", "gradient_clip_val": 1.0} | trainer
    run = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=steps, max_epochs=1, log_every_n_steps=1,
        logger=False, enable_checkpointing=saves, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[curve, *make_callbacks(), *callbacks], **settings,
    )  # fmt: skip
    L.seed_everything(0, verbose=False)
    model = LanguageModel(
        *SIZES, projection=projection, optimizer=partial(optimizer, lr=lr, weight_decay=0.01), schedule=schedule
    )
    run.fit(model, datamodule=Data(batch_size), ckpt_path=resume, weights_only=True)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Result(curve.losses, weights, run, model)


def train_on_two_ranks(folder: Path, *methods: str) -> None:
    """Train each method as one of two ranks, and write its losses and final weights to the folder."""
    for method in methods:
        steps = METHODS[method].comparable_steps
        result = train(method, "ddp", 2, steps=steps, precision="64-true")
        file = folder / f"{method}_{result.trainer.global_rank}.pt"
        torch.save({"losses": result.losses, "weights": result.weights}, file)
