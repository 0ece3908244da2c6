"""A private API of torchmetrics."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from cola_lightning.private_apis.expected import Expected


class ExactMetric(Metric):
    """Metric with states that are moved to the module's device, but not cast to its precision.

    On Apple's GPU (MPS), which has no float64, such states become float32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = ()) -> Any:
        def move(tensor: Tensor) -> Tensor:
            try:
                return fn(tensor).to(tensor.dtype)
            except TypeError:  # torch's error for float64 on MPS
                return fn(tensor.float()).float()

        return super()._apply(move, exclude_state)


EXPECTED = (Expected("torchmetrics:Metric._apply", "self, fn, exclude_state"),)
