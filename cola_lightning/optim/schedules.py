"""Learning-rate schedules.

A schedule is any callable that makes an ``LRScheduler`` of an optimizer: a class of torch, of this file, or your own.
It is stepped once after each optimizer step. If it has an argument of a name in ``LENGTHS``, it gets the run's length.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from cola_lightning.errors import InputError, check_at_least

MakeSchedule = Callable[[Optimizer], LRScheduler]
"""``f(optimizer)`` makes the schedule. It may have one of the arguments below."""
LENGTHS = ("total_steps", "T_max", "total_iters")
"""Names of arguments that mean the number of steps until a schedule's end. If such an argument is not given or is None,
it becomes the number of optimizer steps of the run."""


def make_schedule(make: MakeSchedule, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Make the schedule of a run of ``total_steps`` optimizer steps.

    Raises:
        InputError: If the schedule refuses its arguments, or ends before the run and cannot be stepped further.
    """
    target, given = _unwrap(make)
    name = getattr(target, "__name__", type(target).__name__)
    lengths = dict.fromkeys(open_lengths(target, given), total_steps)
    try:
        schedule = make(optimizer, **lengths)
    except (TypeError, ValueError, ZeroDivisionError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--model.schedule {name} could not be made: {' '.join(str(error).split())}") from error
    if isinstance(schedule, OneCycleLR) and schedule.total_steps < total_steps:
        raise InputError(
            f"--model.schedule {name} ends after {schedule.total_steps} steps, but the run has {total_steps}; leave "
            "its length out, or lower --trainer.max_steps"
        )
    return schedule


def open_lengths(target: Any, given: dict[str, Any]) -> list[str]:
    """List the arguments of ``target`` that mean the run's length and have no value in ``given``."""
    given = {name: value for name, value in given.items() if value is not None}
    if {"epochs", "steps_per_epoch"} <= given.keys():
        return []  # OneCycleLR computes its length from these
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # written in C
        return []
    return [name for name in LENGTHS if name in parameters and name not in given]


def check_schedule(make: MakeSchedule) -> None:
    """Refuse schedules of torch that do not depend on the step alone.

    Raises:
        InputError: If ``make`` is one of them.
    """
    target, _ = _unwrap(make)
    if not isinstance(target, type):
        return
    if issubclass(target, ReduceLROnPlateau):
        raise InputError(
            f"--model.schedule {target.__name__} follows a metric; name a schedule that follows the step, such as "
            "WarmupCosine or CosineAnnealingLR"
        )
    if issubclass(target, ChainedScheduler | SequentialLR):
        raise InputError(
            f"--model.schedule {target.__name__} is made of schedules that have their optimizer already; write a "
            "function of the optimizer that returns it, and name that by its import path"
        )


def _unwrap(make: Any) -> tuple[Any, dict[str, Any]]:
    """Return the callable within partials, and the arguments that they bind by name.

    The command line makes ``partial(instantiate, WarmupCosine, warmup_steps=10)``, which gives ``WarmupCosine`` and
    ``{"warmup_steps": 10}``.
    """
    given: dict[str, Any] = {}
    while isinstance(make, partial):
        given = {**make.keywords, **given}
        classes = [value for value in make.args if isinstance(value, type) and issubclass(value, LRScheduler)]
        make = classes[0] if classes else make.func
    return make, given


class WarmupCosine(LambdaLR):
    """Warm up linearly from 0, then follow half a cosine down to ``min_ratio`` of the peak at ``total_steps``.

    The rate stays there afterwards. This is the schedule of the published scripts (GaLore, CoLA), with one difference:
    they count the step modulo the cycle, so that their last step returns to the start of the warmup.

    Args:
        optimizer: Its groups' learning rates are the peaks.
        total_steps: Optimizer steps of the whole run; the trainer's ``max_steps``.
        warmup_steps: Steps of the linear rise. A run that is shorter ends within the rise.
        min_ratio: Last learning rate as a share of the peak, between 0 and 1.

    Raises:
        InputError: If ``warmup_steps`` is negative or ``min_ratio`` is out of range.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 1000, min_ratio: float = 0.1
    ) -> None:
        _check(warmup_steps, min_ratio)
        super().__init__(optimizer, lambda step: _ratio(step, total_steps, warmup_steps, min_ratio))


class WarmupCosineRestarts(LambdaLR):
    """:class:`WarmupCosine` that restarts at 0 at every multiple of ``cycle_steps``.

    After a restart the rate rises linearly, within ``restart_warmup_steps``, to the value that :class:`WarmupCosine`
    has by then. It is the schedule of ReLoRA (arXiv 2307.05695); SST needs it too. The reference implementation
    requires a run of whole cycles. Here the last one may be shorter.

    Args:
        optimizer: Its groups' learning rates are the peaks.
        total_steps: Optimizer steps of the whole run; the trainer's ``max_steps``.
        cycle_steps: Optimizer steps from one restart to the next.
        warmup_steps: Steps of the first rise. If it is longer than a cycle, the restarts interrupt it; ReLoRA's is not.
        restart_warmup_steps: Steps of the rise after a restart, fewer than ``cycle_steps``.
        min_ratio: Last learning rate as a share of the peak, between 0 and 1.

    Attributes:
        cycle_steps: As given. ReLoRA and SST take it as the length of their own cycles.

    Raises:
        InputError: If the steps do not fit together or ``min_ratio`` is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        cycle_steps: int = 1000,
        warmup_steps: int = 1000,
        restart_warmup_steps: int = 100,
        min_ratio: float = 0.1,
    ) -> None:
        _check(warmup_steps, min_ratio)
        if not 0 <= restart_warmup_steps < cycle_steps:
            raise InputError(
                f"restart_warmup_steps is {restart_warmup_steps}; it must be 0 or more and below cycle_steps, "
                f"{cycle_steps}"
            )

        self.cycle_steps = cycle_steps

        def ratio(step: int) -> float:
            since = step % cycle_steps  # steps after the last restart
            if step < cycle_steps or since >= restart_warmup_steps:
                return _ratio(step, total_steps, warmup_steps, min_ratio)
            # Example: cycles of 1000 with 100 steps of rise. At step 2030 the rate is 30 / 100 of that at step 2100.
            end = step - since + restart_warmup_steps
            return since / restart_warmup_steps * _ratio(end, total_steps, warmup_steps, min_ratio)

        super().__init__(optimizer, ratio)


class WarmupStableDecay(LambdaLR):
    """Warm up linearly from 0, hold the peak, then decay to ``min_ratio`` of the peak at ``total_steps``.

    The rate in the constant part does not depend on the length of the run. Therefore one run with ``decay_share: 0``
    (the trunk) serves several budgets: resume its checkpoint at :func:`decay_start` of each budget, with
    ``--trainer.max_steps`` of the budget and the decay. Each ends as a run of that length from the beginning would.
    ``compare`` does this for the ``budgets`` of a plan. The shape ``1-sqrt`` and the decay of a fifth of the run are
    those of arXiv 2405.18392, section 3.

    Args:
        optimizer: Its groups' learning rates are the peaks.
        total_steps: Optimizer steps of the whole run; the trainer's ``max_steps``.
        warmup_steps: Steps of the linear rise.
        decay_share: Share of ``total_steps`` in which the rate decays, between 0 (never) and 1.
        shape: Shape of the decay: ``linear``, or ``1-sqrt``, which falls faster at first.
        min_ratio: Last learning rate as a share of the peak, between 0 and 1.

    Raises:
        InputError: If a value is out of range, or the warmup does not end before the decay begins.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 1000,
        decay_share: float = 0.2,
        shape: Literal["linear", "1-sqrt"] = "1-sqrt",
        min_ratio: float = 0.0,
    ) -> None:
        _check(warmup_steps, min_ratio)
        start = decay_start(total_steps, decay_share)
        if shape not in ("linear", "1-sqrt"):
            raise InputError(f"shape is {shape!r}; it must be linear or 1-sqrt")
        if warmup_steps > start:
            raise InputError(
                f"warmup_steps is {warmup_steps}, but the decay of a run of {total_steps} steps begins after {start}; "
                f"lower warmup_steps or decay_share, or lengthen the run"
            )

        def ratio(step: int) -> float:
            if step < warmup_steps:
                return step / warmup_steps
            if step <= start:
                return 1.0
            progress = min(1.0, (step - start) / (total_steps - start)) if total_steps > start else 0.0
            return min_ratio + (1 - min_ratio) * (1 - (math.sqrt(progress) if shape == "1-sqrt" else progress))

        super().__init__(optimizer, ratio)


def decay_start(total_steps: int, decay_share: float) -> int:
    """Return the steps of a run before :class:`WarmupStableDecay` lowers the rate.

    Raises:
        InputError: If the share does not lie between 0 and 1.
    """
    if not 0 <= decay_share <= 1:
        raise InputError(f"decay_share is {decay_share}; it must lie between 0 and 1")
    return total_steps - round(decay_share * total_steps)


def _check(warmup_steps: int, min_ratio: float) -> None:
    check_at_least(0, warmup_steps=warmup_steps)
    if not 0 <= min_ratio <= 1:
        raise InputError(f"min_ratio is {min_ratio}; it must lie between 0 and 1")


def _ratio(step: int, total_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Return the learning rate of :class:`WarmupCosine` at a step, as a share of the peak."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2
