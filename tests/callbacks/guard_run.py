"""Runs with bad batches.

For each scenario, rank 0 leaves in FOLDER/STRATEGY/SCENARIO what the run left, and ``result.json``: the final weights
and optimizer states, step, schedule, the data's position, and the error, if there was one.
"""

import json
from functools import partial

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import ConstantLR

from cola_lightning.callbacks import ActivationSpectrum, Checkpoints, GradientNorms, LossGuard, Throughput
from cola_lightning.callbacks.loss_guard import TrainingDivergedError
from cola_lightning.methods import CoLA
from cola_lightning.optim import WarmupCosine
from cola_lightning.training.module import LanguageModel

STEPS, ROWS, POISON = 12, 4, 63

constant = partial(ConstantLR, factor=1.0)
cosine = partial(WarmupCosine, warmup_steps=3)
SCENARIOS = {
    # The batches in their order, which of them are poisoned, the schedule, and settings of guard and trainer
    "skip": (range(STEPS), {5}, constant, {}),
    "left_out": ([n for n in range(STEPS) if n != 5], set(), constant, {}),
    "accumulated": (range(STEPS), {5}, constant, {"accumulate_grad_batches": 2}),
    "back": (range(99), {6, 7, 8}, cosine, {}),
    "went_on_after": ([0, 1, 2, 3, *range(9, 99)], set(), cosine, {}),
    "lost": (range(99), set(range(6, 99)), cosine, {}),
}


class Batches:
    """Goes on where it stands, as the package's loaders do."""

    def __init__(self, order, poisoned, replicas, rank):
        self.order, self.poisoned, self.share, self.rank = order, poisoned, ROWS // replicas, rank
        self.position = 0

    def __len__(self):
        return STEPS if len(self.order) > STEPS else len(self.order)

    def __iter__(self):
        while True:
            number = self.order[self.position]
            starts = torch.randint(62, (ROWS, 1), generator=torch.Generator().manual_seed(number))
            ids = 1 + (starts + torch.arange(16)) % 62
            if number in self.poisoned:
                ids[0] = POISON  # on one rank alone
            ids = ids[self.rank * self.share :][: self.share]
            self.position += 1
            yield {"input_ids": ids, "labels": ids}


class Data(L.LightningDataModule):
    def __init__(self, order, poisoned):
        super().__init__()
        self.order, self.poisoned = order, poisoned

    def train_dataloader(self):
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return Batches(self.order, self.poisoned, ranks["num_replicas"], ranks["rank"])


class Poisoned(LanguageModel):
    """Has no number for one of the ids."""

    def configure_model(self):
        super().configure_model()
        self.network.model.embed_tokens.register_forward_hook(
            lambda _, args, output: output.masked_fill((args[0] == POISON)[..., None], float("nan"))
        )


def run(strategy, devices, folder, scenario):
    order, poisoned, schedule, settings = SCENARIOS[scenario]
    L.seed_everything(0)
    model = Poisoned(
        64, 32, 48, 2, 4, pad_token_id=None,
        projection=partial(CoLA, rank=8), optimizer=partial(torch.optim.AdamW, lr=0.01), schedule=schedule,
    )  # fmt: skip
    checkpoint = Checkpoints(every_n_train_steps=4, keep=3, dirpath=str(folder / "checkpoints"))
    steps = len(order) // settings.get("accumulate_grad_batches", 1) if len(order) <= STEPS else STEPS
    throughput = Throughput()
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=steps, max_epochs=-1, log_every_n_steps=1,
        gradient_clip_val=0.5, logger=TensorBoardLogger(folder, name="", version=""), enable_progress_bar=False,
        enable_model_summary=False, **settings,
        callbacks=[
            throughput, LossGuard(max_rollbacks=2), GradientNorms(), ActivationSpectrum(every_n_steps=10), checkpoint,
        ],
    )  # fmt: skip
    error = None
    try:
        trainer.fit(model, datamodule=Data(order, poisoned))
    except TrainingDivergedError as raised:
        error = str(raised)
    whole = lambda tensor: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()  # noqa: E731
    result = {
        "weights": {name: whole(parameter) for name, parameter in model.named_parameters()},
        "moments": [whole(state["exp_avg"]) for state in trainer.optimizers[0].state.values()],
        "updates": [float(state["step"]) for state in trainer.optimizers[0].state.values()],
        "step": trainer.global_step,
        "schedule": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
        "tokens": throughput.tokens,
        "position": trainer.train_dataloader.position,
        "error": error,
    }
    if trainer.is_global_zero:
        (folder / "result.json").write_text(json.dumps(result))


def run_on_two_ranks(folder, *scenarios):
    """Run each ``STRATEGY/SCENARIO`` as one of two ranks."""
    for each in scenarios:
        strategy, scenario = each.split("/")
        run(strategy, 2, folder / each, scenario)
