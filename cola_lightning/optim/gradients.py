"""Read gradients."""

from torch import Tensor


def gradient_of(p: Tensor) -> Tensor:
    """Return the gradient of a parameter that has one."""
    assert p.grad is not None
    return p.grad
