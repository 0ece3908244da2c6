"""Settings of optimizer and schedule in a resumed run: what is typed wins, what is not comes from the checkpoint.

Loading an optimizer's state replaces its learning rate, weight decay, betas … by those of the checkpoint, and loading a
schedule's state replaces its length. But the command line has taken from the checkpoint what was not typed before the
optimizer was made, so the optimizer as it was made is right.

Some optimizers keep state among these settings too, as Prodigy does with its estimate of the learning rate. Therefore a
value of the checkpoint stays where both runs were made with the same one.
"""

import warnings
from copy import deepcopy
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import TypedDict

from cola_lightning.stored_data import ALTERED, check_stored

Group = dict[str, Any]
ON_DEVICE = ("fused", "capturable")
"""Options of torch's optimizers under which the count of steps is on the parameter's device, else on the CPU."""


class OptimizerSettings:
    """What an optimizer and its schedule were made with in this process.

    Args:
        optimizer: As it was made, with its schedule, before a checkpoint is loaded.
        schedule: Its schedule, a function of the number of steps.

    Attributes:
        groups: For each parameter group its settings that are plain data. A checkpoint holds them.
    """

    def __init__(self, optimizer: Optimizer, schedule: LRScheduler) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        self.groups: list[Group] = [
            {key: value for key, value in group.items() if key != "params" and _is_plain(value)}
            for group in optimizer.param_groups
        ]
        self._rates = [deepcopy(group["lr"]) for group in optimizer.param_groups]
        self._start = deepcopy(schedule.state_dict())

    def restore(self, stored: list[Group] | None, position: int) -> None:
        """Set what differs from ``stored``, and bring the schedule to its step, after a checkpoint was loaded.

        Args:
            stored: ``groups`` of the run that wrote the checkpoint; if None, nothing of the checkpoint stays.
            position: Steps of the schedule that were made.
        """
        for index, (group, made) in enumerate(zip(self.optimizer.param_groups, self.groups, strict=True)):
            before = stored[index] if stored and index < len(stored) else {}
            changed = [
                key for key, value in made.items() if key not in before or _as_list(before[key]) != _as_list(value)
            ]
            group.update({key: deepcopy(made[key]) for key in changed if key != "lr"})  # which the schedule sets
            # A text where a number belongs would come to light in the middle of a step.
            numbers = [key for key, value in made.items() if type(value) in (int, float) and _is_plain(group.get(key))]
            kind = TypedDict("_Group", dict.fromkeys(numbers, float))  # type: ignore[misc]
            check_stored(group, kind, f"in optimizer_states.param_groups.{index}", ALTERED)
            if any(key in changed for key in ON_DEVICE):
                self._place_steps(group)
        self._replay(position)

    def _place_steps(self, group: Group) -> None:
        on_device = any(group.get(key) for key in ON_DEVICE)
        for parameter in group["params"]:
            state = self.optimizer.state.get(parameter, {})
            if isinstance(step := state.get("step"), torch.Tensor):
                state["step"] = step.to(parameter.device if on_device else "cpu")

    def _replay(self, steps: int) -> None:
        """Step the schedule from its beginning. Its rate may be computed from the one before, as that of torch's
        ``CosineAnnealingLR`` is, so that the step alone does not tell it."""
        self.schedule.load_state_dict(deepcopy(self._start))
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects a step of the optimizer before each
            for _ in range(steps):
                self.schedule.step()


def keep_patience(trainer: L.Trainer, states: dict[str, Any]) -> None:
    """Let the patience of an EarlyStopping callback win over the one that ``states``, by callback, hold of it."""
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and callback.state_key in states:
            states[callback.state_key]["patience"] = callback.patience


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _as_list(value: Any) -> Any:
    """Tuples as lists, for a config has only these."""
    return [_as_list(each) for each in value] if isinstance(value, list | tuple) else value
