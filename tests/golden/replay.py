"""Replay steps that an author's code made: the same inputs, compared with what came out there."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import silu

MATRICES = ("wide", "square", "tall")  # 12 x 20, 12 x 12, 18 x 12


def golden(method: str, name: str = "steps") -> dict[str, Tensor]:
    """Read official float32 tensors as float64.

    Ours computes in float64, so that the distance is what float32 rounded on the authors' side: the same number on
    every processor.
    """
    data = load_file(Path(__file__).parent / method / f"{name}.safetensors")
    return {key: value.double() if value.is_floating_point() else value for key, value in data.items()}


def distance(found: Tensor, official: Tensor) -> float:
    """Return the norm of the difference over that of the official tensor; only the norm if the official is zero."""
    return float((found - official).norm() / official.norm().clamp(min=1e-12))


class Net(nn.Module):
    """``tall silu(square silu(wide x))``, each matrix a module made by a method."""

    def __init__(
        self, make: Callable[[int, int], nn.Module], sizes: tuple[tuple[int, int], ...] = ((20, 12), (12, 12), (12, 18))
    ) -> None:
        super().__init__()
        self.wide, self.square, self.tall = (make(*size) for size in sizes)
        self.double()

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        y = self.tall(silu(self.square(silu(self.wide(x)))))
        return 10 * (y - target).square().mean()

    def start(self, data: dict[str, Tensor], names: dict[str, str] | None = None) -> None:
        """Set the official first values; ``names`` maps our parameters' names to those of the data."""
        with torch.no_grad():
            for matrix in MATRICES:
                for name, tensor in getattr(self, matrix).state_dict().items():
                    tensor.copy_(data[f"initial.{matrix}.{(names or {}).get(name, name)}"])


def steps(net: Net, data: dict[str, Tensor], bound: float = 1e-6) -> Iterator[int]:
    """Yield each step's number after its backward pass; its loss must be the official one to a relative ``bound``."""
    for number, (x, target) in enumerate(zip(data["x"], data["target"], strict=True)):
        net.zero_grad()
        loss = net.loss(x, target)
        loss.backward()
        assert distance(loss.detach(), data["loss"][number]) <= bound, number
        yield number
