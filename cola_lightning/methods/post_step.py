"""Base of the callbacks that change the network after an optimizer step: ReLoRA, SwitchLoRA, SST."""

from hashlib import blake2b
from typing import Any, Generic, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import TypedDict

from cola_lightning.errors import InputError
from cola_lightning.models.projection import Projection
from cola_lightning.optim.rows import local
from cola_lightning.private_apis.lightning import global_seed
from cola_lightning.stored_data import ALTERED, check_stored


def mixed_seed(*numbers: int) -> int:
    """Make one seed from several numbers, by a hash: neighbouring numbers give unrelated seeds."""
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def generator(*numbers: int) -> torch.Generator:
    """Make a CPU generator whose draws depend on these numbers alone.

    All ranks draw the same from it, and a resumed run needs no saved state.
    """
    return torch.Generator().manual_seed(mixed_seed(*numbers))


def schedule_cycle(trainer: L.Trainer, argument: str) -> int:
    """Read the number of steps in a cycle of the run's schedule.

    Args:
        trainer: The trainer, whose schedules exist already.
        argument: Argument to name in the message, for instance ``ReLoRACallback: merge_every``.

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


ZERO_AT_FIRST = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "momentum_buffer", "held"}
"""Names of optimizer states that are zero before the first step, in torch's optimizers and in ours."""


def restart(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Set the optimizer state of a parameter back to what it was before the first step.

    It is set to zero if it starts so, because FSDP2 can load a checkpoint only if every trained parameter has a state.
    Another state is removed.
    """
    state = optimizer.state.get(parameter, {})
    if not state.keys() <= ZERO_AT_FIRST:
        del optimizer.state[parameter]
        return
    for name, value in state.items():
        if isinstance(value, Tensor):
            local(value).zero_()
        elif value is not None:
            state[name] = 0


class _State(TypedDict):
    seed: int | None


P = TypeVar("P", bound=Projection)


class PostStepCallback(L.Callback, Generic[P]):
    """Acts on the network after each optimizer step, once the schedule is updated and before a checkpoint is written.

    Under FSDP2 a rank has some rows of every matrix and of its optimizer state, see
    :mod:`~cola_lightning.optim.rows`.

    A subclass names the projections in ``projection_class`` and acts on ``self.projections`` in ``after_step``. It
    draws random numbers from ``self.draw(step, …)``.

    Args:
        seed: Seed of what is drawn; the seed of the run if not given. It is saved in checkpoints, and a resumed run
            keeps it unless another is given.

    Raises:
        InputError: Before training starts, if the strategy flattens weights, as FSDP (1) and DeepSpeed do, or if the
            network has no such projections.
    """

    projection_class: type[P]
    projections: list[P]
    network: nn.Module
    optimizer: Optimizer

    def __init__(self, seed: int | None = None) -> None:
        self.seed, self._seed_is_given = seed, seed is not None

    def after_step(self, trainer: L.Trainer, step: int) -> None:
        """Act after optimizer step number ``step``, counted from 1."""
        raise NotImplementedError

    def draw(self, *numbers: int) -> torch.Generator:
        """Make the generator of these numbers: the step, and for instance the projection's index."""
        assert self.seed is not None  # setup took it from the run
        return generator(self.seed, *numbers)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        works = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
        if not works or isinstance(strategy, DeepSpeedStrategy):  # which is a DDPStrategy
            raise InputError(
                f"{type(self).__name__} changes single matrices and their optimizer state, which "
                f"{type(strategy).__name__} flattens; set --trainer.strategy fsdp2, ddp or auto"
            )
        self.seed = global_seed() if self.seed is None else self.seed

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        network = pl_module.network
        assert isinstance(network, nn.Module)
        self.network, self.optimizer = network, trainer.optimizers[0]
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
        if trainer.global_step != self._step:  # otherwise gradients are still being accumulated
            self._step = trainer.global_step
            self.after_step(trainer, self._step)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_stored(state_dict, _State, f"in the state of {type(self).__name__}", ALTERED)
        if not self._seed_is_given:
            self.seed = state_dict["seed"]
