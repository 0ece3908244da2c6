"""Settings of optimizer and schedule in a resumed run: typed values win, others come from the checkpoint.

Loading an optimizer's state replaces its learning rate, weight decay, betas … by those of the checkpoint, and loading a
schedule's state replaces its length. But before the optimizer was made, the command line had already taken from the
checkpoint what was not typed. So the settings that the optimizer was made with are the right ones.

Some optimizers keep state among their settings, such as Prodigy its estimate of the learning rate. Therefore a value of
the checkpoint stays if both runs made the optimizer with the same value.
"""

import warnings
from copy import deepcopy
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import TypedDict

from cola_lightning.optim import HybridOptimizer
from cola_lightning.stored_data import ALTERED, check_stored
from cola_lightning.training.trainer_attributes import callbacks_of

Group = dict[str, Any]
ON_DEVICE = ("fused", "capturable")
"""Options of torch's optimizers that keep the count of steps on the parameter's device, not on the CPU."""


class OptimizerSettings:
    """Settings that an optimizer and its schedule were made with in this process.

    Args:
        optimizer: The optimizer, before a checkpoint is loaded.
        schedule: Its schedule, a function of the number of steps.

    Attributes:
        classes: Name of the optimizer's class, or of each part's of a ``HybridOptimizer``. A checkpoint holds them.
        groups: Settings of each parameter group that are plain data. A checkpoint holds them.
    """

    def __init__(self, optimizer: Optimizer, schedule: LRScheduler) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        parts = optimizer.parts if isinstance(optimizer, HybridOptimizer) else (optimizer,)
        self.classes = [type(part).__name__ for part in parts]
        self.groups: list[Group] = [
            {key: value for key, value in group.items() if key != "params" and _is_plain(value)}
            for group in optimizer.param_groups
        ]
        self._rates = [deepcopy(group["lr"]) for group in optimizer.param_groups]
        self._start = deepcopy(schedule.state_dict())

    def restore(self, stored: list[Group] | None, position: int) -> None:
        """Set again what differs from ``stored``, and bring the schedule to its step, after a checkpoint was loaded.

        Args:
            stored: ``groups`` of the run that wrote the checkpoint; if None, all settings are set again.
            position: Number of steps that the schedule has made.
        """
        for index, (group, made) in enumerate(zip(self.optimizer.param_groups, self.groups, strict=True)):
            before = stored[index] if stored and index < len(stored) else {}
            changed = [
                key for key, value in made.items() if key not in before or _as_list(before[key]) != _as_list(value)
            ]
            # The schedule sets the learning rate, in ``_replay``.
            group.update({key: deepcopy(made[key]) for key in changed if key != "lr"})
            # A string in place of a number would fail only in the middle of the next step.
            numbers = [key for key, value in made.items() if type(value) in (int, float) and _is_plain(group.get(key))]
            kind = TypedDict("_Group", dict.fromkeys(numbers, float))  # type: ignore[misc]
            check_stored(group, kind, f"in optimizer_states.param_groups.{index}", ALTERED)
            if any(key in changed for key in ON_DEVICE):
                self._place_steps(group)
        self._replay(position)

    def warn_of_other_classes(self, stored: list[str]) -> None:
        """Warn if the checkpoint was written under optimizers of other classes than this run's.

        torch loads any state into any optimizer. What the optimizer does not find there begins anew, or is missed in
        the first step.
        """
        if stored != self.classes:
            rank_zero_warn(
                f"The checkpoint was written under {', '.join(stored)}, and this run goes on with "
                f"{', '.join(self.classes)}: states that the former did not keep begin anew"
            )

    def _place_steps(self, group: Group) -> None:
        """Move the counts of steps to the device where this run's optimizer expects them."""
        on_device = any(group.get(key) for key in ON_DEVICE)
        for parameter in group["params"]:
            state = self.optimizer.state.get(parameter, {})
            if isinstance(step := state.get("step"), torch.Tensor):
                state["step"] = step.to(parameter.device if on_device else "cpu")

    def _replay(self, steps: int) -> None:
        """Step the schedule from its beginning. A schedule such as torch's ``CosineAnnealingLR`` computes each rate
        from the one before, so the rate cannot be computed from the number of steps alone."""
        self.schedule.load_state_dict(deepcopy(self._start))
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns if the optimizer makes no step before each of these
            for _ in range(steps):
                self.schedule.step()


def keep_patience(trainer: L.Trainer, states: dict[str, Any]) -> None:
    """Replace the stored patience of EarlyStopping callbacks in ``states``, by callback, by that of this run."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, EarlyStopping) and callback.state_key in states:
            states[callback.state_key]["patience"] = callback.patience


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _as_list(value: Any) -> Any:
    """Turn tuples into lists at any depth, because a config file has only lists."""
    return [_as_list(each) for each in value] if isinstance(value, list | tuple) else value
