"""What the methods share that act on the network between two optimizer steps: ReLoRA, SwitchLoRA, SST."""

from hashlib import blake2b
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import nn
from torch.optim import Optimizer
from typing_extensions import TypedDict

from cola_lightning.errors import InputError
from cola_lightning.models.projection import Projection
from cola_lightning.private_apis import global_seed
from cola_lightning.stored_data import ALTERED, check_stored


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers, each of which changes all of it."""
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def generator(*numbers: int) -> torch.Generator:
    """A generator that depends on these numbers alone: on all ranks it draws the same, on any device, and a resumed run
    needs no state of it. It draws on the CPU."""
    return torch.Generator().manual_seed(mixed_seed(*numbers))


def schedule_cycle(trainer: L.Trainer, argument: str) -> int:
    """Read how many steps a cycle of the run's schedule has.

    Args:
        trainer: Its schedules are made.
        argument: What the message says to set instead, for instance ``ReLoRACallback: merge_every``.

    Raises:
        InputError: If the schedule has no cycles.
    """
    for config in trainer.lr_scheduler_configs:
        if hasattr(config.scheduler, "cycle_steps"):
            return config.scheduler.cycle_steps
    raise InputError(
        f"{argument} is not given, and the run's schedule has no cycle_steps to take it from; give a number of steps, "
        f"or set --model.schedule cola_lightning.optim.WarmupCosineRestarts"
    )


class _State(TypedDict):
    seed: int | None


class PostStepCallback(L.Callback):
    """Acts after each optimizer step, when the schedule has moved on, and before a checkpoint is written.

    A subclass says in ``kind`` which projections it acts on, and in ``after_step`` what it does. What it draws comes
    from ``generator(self.seed, step, …)``.

    Args:
        seed: Of what is drawn; that of the run if not given. It is saved: a resumed run goes on with it, if
            none is given.

    Raises:
        InputError: Before training starts: under a strategy that shards or hides weights or optimizer state, or if the
            network has no such projections.
    """

    projection_class: type[Projection]
    network: nn.Module
    optimizer: Optimizer

    def __init__(self, seed: int | None = None) -> None:
        self.seed, self._seed_is_given = seed, seed is not None

    def after_step(self, trainer: L.Trainer, step: int) -> None:
        """Act, ``step`` optimizer steps having been made."""
        raise NotImplementedError

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
        if not whole:
            raise InputError(
                f"{type(self).__name__} changes weights and optimizer state in place, which {type(strategy).__name__} "
                f"shards or hides; set --trainer.strategy ddp, or auto"
            )
        self.seed = global_seed() if self.seed is None else self.seed

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.network, self.optimizer = pl_module.network, trainer.optimizers[0]
        self.projections = [module for module in self.network.modules() if isinstance(module, self.projection_class)]
        if not self.projections:
            raise InputError(
                f"{type(self).__name__} acts on {self.projection_class.__name__} projections, of which the network has "
                f"none; set --model.projection {self.projection_class.__name__}, or remove the callback"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:  # else gradients are still being accumulated
            self._step = trainer.global_step
            self.after_step(trainer, self._step)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_stored(state_dict, _State, f"in the state of {type(self).__name__}", ALTERED)
        if not self._seed_is_given:
            self.seed = state_dict["seed"]
