"""Learning rate as a function of the step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cola_lightning.errors import InputError


class WarmupCosine(LambdaLR):
    """Linear warm-up from 0, then half a cosine down to ``min_ratio`` of the peak, which holds from ``total_steps`` on.

    The benchmark's schedule (GaLore, CoLA), but for its wrap-around: the reference counts its position modulo the cycle
    and returns to the start of the warm-up at the last step.

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
    """:class:`WarmupCosine` that goes back to 0 at every multiple of ``cycle_steps``, and within
    ``restart_warmup_steps`` rises linearly to where it would then be: ReLoRA's schedule (arXiv 2307.05695), and what
    SST needs too.

    The reference implementation asks for a run of whole cycles; here the last one may be cut short.

    Args:
        optimizer: Its groups' learning rates are the peaks.
        total_steps: Optimizer steps of the whole run; the trainer's ``max_steps``.
        cycle_steps: Optimizer steps from one restart to the next.
        warmup_steps: Steps of the first rise; ReLoRA's is no longer than a cycle. One that is longer has restarts too.
        restart_warmup_steps: Steps of the rise after a restart, fewer than ``cycle_steps``.
        min_ratio: Last learning rate as a share of the peak, between 0 and 1.

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

        def ratio(step: int) -> float:
            since = step % cycle_steps
            if step < cycle_steps or since >= restart_warmup_steps:
                return _ratio(step, total_steps, warmup_steps, min_ratio)
            end = step - since + restart_warmup_steps
            return since / restart_warmup_steps * _ratio(end, total_steps, warmup_steps, min_ratio)

        super().__init__(optimizer, ratio)


def _check(warmup_steps: int, min_ratio: float) -> None:
    if warmup_steps < 0:
        raise InputError(f"warmup_steps is {warmup_steps}; it must be 0 or more")
    if not 0 <= min_ratio <= 1:
        raise InputError(f"min_ratio is {min_ratio}; it must lie between 0 and 1")


def _ratio(step: int, total_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """The learning rate of :class:`WarmupCosine` as a share of the peak."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2
