"""Muon for plain matrices and for those that FSDP2 shards."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cola_lightning.optim.gradients import gradient_of
from cola_lightning.optim.rows import is_dtensor
from cola_lightning.optim.sharded import map_whole


class Muon(torch.optim.Muon):
    """torch's Muon (arXiv 2502.16982), for plain matrices and for those that FSDP2 shards.

    Under FSDP2 the momentum is sharded like the weight. Each matrix is gathered on one rank, orthogonalized there by
    torch's code, and each rank receives its rows of the result (:func:`~cola_lightning.optim.sharded.map_whole`). So
    each matrix (m x n) is orthogonalized once, and over k ranks a step sends 2 m n (k - 1) / k numbers for it.

    Arguments are those of ``torch.optim.Muon``.
    """

    takes_sharded_matrices = True  # see cola_lightning.distributed.strategies.check_optimizer
    needs_matrices = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not any(is_dtensor(p) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_sharded([p for p in group["params"] if p.grad is not None], group)
        return loss

    def _step_sharded(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        def advance_momentum(p: Tensor) -> Tensor:
            """Advance the momentum, and return the matrix to orthogonalize."""
            state, grad = self.state[p], gradient_of(p)
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
            return grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

        def orthogonalize(_: Tensor, matrix: Tensor) -> Tensor:
            """Return minus the learning rate times the orthogonalized matrix: torch's Muon adds that to a matrix of
            zeros at a step without weight decay, with ``matrix`` as the momentum, which momentum 1 leaves as it is."""
            weight = torch.zeros_like(matrix)
            weight.grad = torch.zeros((), dtype=matrix.dtype, device=matrix.device).expand(matrix.shape)  # no memory
            settings = {name: value for name, value in group.items() if name in self.defaults}
            muon = torch.optim.Muon([weight], **settings | {"momentum": 1.0, "nesterov": False, "weight_decay": 0.0})
            muon.state[weight]["momentum_buffer"] = matrix
            muon.step()
            return weight

        def shape(p: Tensor) -> tuple[int, int]:
            return p.shape[0], p.shape[1]

        for p, update in map_whole(parameters, advance_momentum, orthogonalize, shape):
            p.mul_(1 - float(group["lr"]) * group["weight_decay"])
            p.add_(update)
