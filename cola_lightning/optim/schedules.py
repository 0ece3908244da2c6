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
        if warmup_steps < 0:
            raise InputError(f"warmup_steps is {warmup_steps}; it must be 0 or more")
        if not 0 <= min_ratio <= 1:
            raise InputError(f"min_ratio is {min_ratio}; it must lie between 0 and 1")
        decay_steps = max(1, total_steps - warmup_steps)

        def ratio(step: int) -> float:
            if step < warmup_steps:
                return step / warmup_steps
            progress = min(1.0, (step - warmup_steps) / decay_steps)
            return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2

        super().__init__(optimizer, ratio)
