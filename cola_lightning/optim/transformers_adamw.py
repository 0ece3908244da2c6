"""AdamW as the transformers library had it up to version 4, which GaLore, Fira and APOLLO were published with."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cola_lightning.optim.gradients import gradient_of


def advance_moments(state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> tuple[Tensor, float]:
    """Advance Adam's moments by one step, and return the normalized moment and the step size.

    ``torch.optim.AdamW`` divides by ``√(V / (1 - β₂ᵗ)) + eps``. Here eps is added before the bias correction, which is
    in the step size: ``N = M / (√V + eps)`` and ``lr √(1 - β₂ᵗ) / (1 - β₁ᵗ)``. The two differ where a gradient is not
    much larger than eps.

    Args:
        state: State of one parameter, with ``step``. The moments are added at the first step.
        grad: Gradient, or its projection, of any shape.
        group: Options of the parameter's group: ``lr``, ``betas`` and ``eps``.

    Returns:
        N, in the gradient's shape, and the step size.
    """
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
    beta1, beta2 = group["betas"]
    state["step"] += 1
    state["exp_avg"].lerp_(grad, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    normed = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
    return normed, group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])


def decay_weights(p: Tensor, group: dict[str, Any]) -> None:
    """Decay the weights after their update, as transformers did; ``torch.optim.AdamW`` does it before."""
    if group["weight_decay"]:
        p.mul_(1 - group["lr"] * group["weight_decay"])


class StepEachParameter(Optimizer):
    """Optimizer that updates one parameter at a time, in ``step_parameter`` of a subclass."""

    def step_parameter(self, p: Tensor, group: dict[str, Any]) -> None:
        """Update a parameter that has a gradient, by the options of its group."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Prepare a step, before any parameter is updated."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.before_step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.step_parameter(p, group)
        return loss


class TransformersAdamW(StepEachParameter):
    """AdamW with eps added before the bias correction, and weight decay after the update.

    The authors' optimizers of GaLore, Fira and APOLLO use it for the parameters that they do not project: embedding,
    head and norms. transformers 5 no longer has it.

    Args:
        params: Parameters of any shape.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Number that is added to the root of the second moment.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def step_parameter(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        state.setdefault("step", 0)
        normed, size = advance_moments(state, gradient_of(p), group)
        p.add_(normed, alpha=-size)
        decay_weights(p, group)
