"""Count the parameters of a network, part by part."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from cola_lightning.models import Llama

PARTS = ("embedding", "attention projections", "MLP projections", "norms", "head")


@dataclass
class Part:
    """Sizes of a part of a network.

    Attributes:
        trained: Parameters with a gradient.
        frozen: Parameters without a gradient.
        buffer_bytes: Bytes of buffers, such as index tables.
    """

    trained: int = 0
    frozen: int = 0
    buffer_bytes: int = 0

    @property
    def parameters(self) -> int:
        return self.trained + self.frozen

    def __add__(self, other: "Part") -> "Part":
        return Part(self.trained + other.trained, self.frozen + other.frozen, self.buffer_bytes + other.buffer_bytes)


@dataclass
class Parameters:
    """Parameters of a network by part, and those of its largest decoder layer."""

    parts: dict[str, Part] = field(default_factory=lambda: {name: Part() for name in PARTS})
    layer: Part = field(default_factory=Part)

    @property
    def total(self) -> Part:
        return sum(self.parts.values(), Part())

    @property
    def outside_layers(self) -> Part:
        """Embedding and head. The final norm is left out, because it is too small to matter."""
        return self.parts["embedding"] + self.parts["head"]


def count_parameters(build: Callable[[], Llama]) -> Parameters:
    """Count the parameters of the network that ``build()`` makes, on the meta device, so that no memory is taken.

    For LLaMA with L layers, embedding and head have V D parameters each, and norms (2 L + 1) D. A layer's projections
    have 4 D² + 3 D F at full rank with as many key as query heads, and R (11 D + 3 F) as two factors.
    """
    with torch.device("meta"):
        network = build()
    counted = Parameters()
    for name, module in network.named_modules():
        counted.parts[_part(name, module)] += _own(module)
    for layer in network.model.layers:
        sizes = sum(map(_own, layer.modules()), Part())
        if sizes.parameters > counted.layer.parameters:
            counted.layer = sizes
    return counted


def _part(name: str, module: nn.Module) -> str:
    if isinstance(module, nn.RMSNorm):
        return "norms"
    for inside, part in (("self_attn", PARTS[1]), ("mlp", PARTS[2]), ("embed_tokens", PARTS[0])):
        if inside in name.split("."):
            return part
    return "head" if name.startswith("lm_head") else "norms"


def _own(module: nn.Module) -> Part:
    """Count a module's own parameters and buffers, without those of its children."""
    own = list(module.parameters(recurse=False))
    return Part(
        trained=sum(p.numel() for p in own if p.requires_grad),
        frozen=sum(p.numel() for p in own if not p.requires_grad),
        buffer_bytes=sum(b.numel() * b.element_size() for b in module.buffers(recurse=False)),
    )
