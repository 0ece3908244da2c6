"""Twenty steps under one strategy, as the ranks of ``tests.processes`` run them.

Global batch, seed and data are the same whatever the strategy. Rows differ in length, so that a loss which depends on
how a batch is cut shows. All run in float64 but DeepSpeed, which has no float64: there 1e-9 tells a difference in what
is computed from rounding, on any processor.
"""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from torch.utils.data import Dataset

from cola_lightning.callbacks import Checkpoints
from cola_lightning.data.row_loader import TrainLoader
from cola_lightning.distributed.strategies import FSDP2Strategy, ZeROStrategy, check_world_size
from cola_lightning.methods import CoLA, CoLAM, LaX, LoRA, SLTrain
from cola_lightning.optim import WarmupCosine
from cola_lightning.training.module import LanguageModel
from tests.recorder import Curve

STEPS, GLOBAL_BATCH, MICRO_BATCH, CLIP = 20, 8, 2, 0.5
METHODS = {
    "lora": partial(LoRA, rank=8, dropout=0),
    "sltrain": partial(SLTrain, rank=8, sparsity=0.1),
    "lax": partial(LaX, rank=8),
}


KEEPS = ["none", "residual_and_latents", "latents"]
"""Settings of CoLA-M's ``keep``. Each gives the curve of CoLA."""
OTHERS = [*METHODS, "fast"]
"""Methods, and the fast paths. Each has a curve of its own."""
FAST = {"fused_projections": True, "loss_chunk_size": 30}  # no divisor of the tokens of a batch


# By name, because Lightning refuses float64 with an object of this class, not with its name.
StrategyRegistry.register("fsdp2_sharded", FSDP2Strategy, override=True, save_distributed_checkpoint=True)


class DeepSpeedOnCPU(ZeROStrategy):
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
        return {"input_ids": ids, "labels": ids.where(torch.arange(24) < 2 + 5 * index % 23, -100)}


class Data(L.LightningDataModule):
    def state_dict(self):
        return {"position": self.loader.position}

    def load_state_dict(self, state_dict):
        self.position = state_dict["position"]

    def __init__(self, batch_size):
        super().__init__()
        self.batch_size, self.position = batch_size, 0

    def train_dataloader(self):
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        replicas = ranks["num_replicas"]
        window = self.trainer.accumulate_grad_batches
        self.loader = TrainLoader(
            Rows(), self.batch_size, STEPS * window, seed=1, position=self.position, replicas=replicas,
            rank=ranks["rank"], batches_per_step=window,
        )  # fmt: skip
        return self.loader


def strategy_named(name: str, micro_batch: int) -> object:
    match name.split("_"):
        case ["auto", *_]:
            return "auto"
        case ["deepspeed", stage, *offload]:
            return DeepSpeedOnCPU(
                stage=int(stage), process_group_backend="gloo", logging_batch_size_per_gpu=micro_batch,
                offload_optimizer=bool(offload), offload_parameters=bool(offload) and stage == "3", pin_memory=False,
            )  # fmt: skip
        case _:
            return name


def train(
    strategy: str,
    ranks: int,
    out: str,
    keep: str = "none",
    resume: str | None = None,
    micro_batch: int = MICRO_BATCH,
) -> None:
    """Write the losses and the gradient norms before clipping to OUT/curve.json, and checkpoints at steps 10 and 20."""
    torch.set_num_threads(1)
    curve = Curve()
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy_named(strategy, micro_batch), max_steps=STEPS,
        max_epochs=1, accumulate_grad_batches=GLOBAL_BATCH // (ranks * micro_batch), log_every_n_steps=1,
        precision="32-true" if strategy.startswith(("deepspeed", "auto_32")) else "64-true", gradient_clip_val=CLIP,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            curve, Checkpoints(10, dirpath=out, minutes_at_end=0),
            *([] if keep in ("none", "fast", *METHODS) else [CoLAM(keep)]),
        ],
    )  # fmt: skip
    if resume:
        check_world_size(trainer.strategy, Path(resume), trainer.world_size)
    L.seed_everything(0)
    model = LanguageModel(
        64, 32, 48, 3, 4,
        projection=METHODS.get(keep, partial(CoLA, rank=8)),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        schedule=partial(WarmupCosine, warmup_steps=5),
        **(FAST if keep == "fast" else {}),
    )  # fmt: skip
    trainer.fit(model, datamodule=Data(micro_batch), ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(Path(out, "asked-for.ckpt"))  # as callbacks of others do
    if trainer.is_global_zero:
        Path(out, "curve.json").write_text(json.dumps([curve.losses, curve.norms]))


def train_each(strategy: str, ranks: int, out: str, keeps: list[str], micro_batch: int = MICRO_BATCH) -> None:
    """One run after another, in OUT/KEEP, for each way of checkpointing (CoLA-M's ``keep``, or none), method, or
    with the fast paths."""
    for keep in keeps:
        train(strategy, ranks, f"{out}/{keep}", keep, micro_batch=micro_batch)
