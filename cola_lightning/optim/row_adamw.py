"""AdamW with a step counter for each row of a parameter."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cola_lightning.errors import InputError
from cola_lightning.optim.gradients import gradient_of
from cola_lightning.optim.rows import local, rows_of, set_rows, zero_rows
from cola_lightning.private_apis.torch import foreach


class RowAdamW(Optimizer):
    """AdamW (arXiv 1711.05101) with a step counter for each row, an entry along a parameter's first dimension.

    A row can be restarted and held for some steps. SwitchLoRA needs both. Without :meth:`restart` the optimizer does
    what ``torch.optim.AdamW`` does. The counters are on the parameters' device and are read only there, so that no step
    waits for the device. Under FSDP2 moments and counters are sharded as the parameter is, and nothing is sent.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Number that is added to the root of the second moment.
        weight_decay: Decoupled weight decay: each step subtracts lr * weight_decay times the parameter.

    Raises:
        InputError: If an argument is negative or a beta is not below 1.
    """

    takes_sharded_matrices = True  # see cola_lightning.distributed.strategies.check_optimizer

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if min(lr, eps, weight_decay, *betas) < 0 or max(betas) >= 1:
            raise InputError(
                f"RowAdamW: lr {lr}, betas {betas}, eps {eps} and weight_decay {weight_decay} must not be negative, "
                f"and the betas must be below 1"
            )
        # With "capturable", load_state_dict keeps "step" in float32 and moves it to the parameter's device.
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "capturable": True}
        super().__init__(params, settings)

    @torch.no_grad()
    def restart(self, parameter: Tensor, rows: Tensor, hold: int = 0) -> None:
        """Set moments and counters of some rows to zero, and do not change these rows for the next ``hold`` steps.

        The counter of a held row advances, as in SwitchLoRA's reference implementation. Its first steps afterwards are
        therefore shorter than those of a new row.

        Args:
            parameter: One of the parameters (rows x …).
            rows: Indices of the rows, int64, on any device; under FSDP2 the same on all ranks.
            hold: Number of steps.
        """
        for name, value in self._state(parameter).items():
            set_rows(rows_of(value), rows, hold if name == "held" else 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step; ``closure``, if given, computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)
        return loss

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            ones = (1,) * (parameter.dim() - 1)
            state["step"], state["held"] = zero_rows(parameter, *ones), zero_rows(parameter, *ones)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        states = [self._state(parameter) for parameter in parameters]
        # Rows are independent of each other, so that a rank of FSDP2 works on those that it has.
        steps, held, first, second = (
            [local(state[k]) for state in states] for k in ("step", "held", "exp_avg", "exp_avg_sq")
        )
        grads = [local(gradient_of(parameter)) for parameter in parameters]
        parameters = [local(parameter) for parameter in parameters]
        # 0 for a held row and 1 for another: held rows get a gradient of 0 and no weight decay.
        moving = [(h == 0).to(p.dtype) for h, p in zip(held, parameters, strict=True)]
        grads = [grad * m for grad, m in zip(grads, moving, strict=True)]
        foreach.add_(steps, 1)
        foreach.sub_(held, 1)
        foreach.clamp_min_(held, 0)
        foreach.lerp_(first, grads, 1 - beta1)
        foreach.mul_(second, beta2)
        foreach.addcmul_(second, grads, grads, 1 - beta2)
        if group["weight_decay"]:
            for parameter, m in zip(parameters, moving, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"] * m)
        roots = foreach.sqrt(second)
        for parameter, step, m, root in zip(parameters, steps, first, roots, strict=True):
            # A held row has moments of 0, so that its update is 0.
            step = step.to(torch.promote_types(parameter.dtype, torch.float32))  # the counters are float32
            root = root.div(bias_correction(beta2, step).sqrt()).add_(group["eps"])
            parameter.addcdiv_(m / bias_correction(beta1, step), root, value=-group["lr"])


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """Return ``1 - βᵗ``, by which a moment of t steps is divided, in the dtype of the counters ``step``."""
    return 1 - beta**step
