"""Decoder layers without embedding and head, on which methods are compared."""

import torch
from torch import Tensor

from cola_lightning.models import Llama, LlamaConfig
from cola_lightning.models.llama import run_layers
from cola_lightning.models.rotary import rotary_table


class Stack:
    """Decoder layers from a fixed input to a scalar, their weights stirred so that nothing is zero."""

    def __init__(self, projection, policy=None, layers=4, dtype=torch.float32, sizes=(64, 96, 4), autocast=False):
        torch.manual_seed(0)
        d, f, heads = sizes
        self.network = Llama(LlamaConfig(50, d, f, layers, heads), projection)
        for name, p in self.network.named_parameters():
            if "beta" in name:
                torch.nn.init.normal_(p, mean=0.8, std=0.1)
            elif name.endswith("B.weight"):
                torch.nn.init.normal_(p, std=0.05)
        self.network.to(dtype)
        if policy:
            policy(self.network)
        self.layers = self.network.model.layers
        self.x = torch.randn(2, 16, d).to(dtype).requires_grad_()
        self.rotary = rotary_table(16, d // heads, 10000.0, like=self.x)
        self.parameters = list(self.layers.parameters())
        self.autocast = autocast

    def forward(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return run_layers(self.layers, self.x, self.rotary)

    def step(self) -> None:
        self.forward().float().square().mean().backward()

    def gradient(self) -> Tensor:
        self.step()
        return torch.cat([p.grad.float().flatten() for p in [self.x, *self.parameters]])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
