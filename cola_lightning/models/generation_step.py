"""The compiled step of generation: one more token of one row, reading each weight once from memory.

At batch 1 a token takes as long as its weights take to be read. ``linear`` of one row reaches about half of a
processor's memory bandwidth, and each operation of a layer costs a call. Here ``torch.compile`` makes a layer one
function. A product of one row is written as multiplication and sum, from which Inductor makes a loop that reads the
matrix once at the speed of memory, converts bf16 or int8 on the way, and joins products that share their input.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cola_lightning.models.kv_cache import Cache
from cola_lightning.models.llama import run_layers
from cola_lightning.models.loss import at_least_float32
from cola_lightning.models.rotary import Rotary
from cola_lightning.private_apis.torch import allow_compilations


def row_product(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply one row (1, 1, in) by a matrix (out, in), summing in float32 at least; -> (1, 1, out).

    Uncompiled it would keep all products of two numbers.
    """
    row = at_least_float32(x.flatten())  # (in,)
    y = (weight.to(row.dtype) * row).sum(-1)  # (out, in) times (in,), summed over in: (out,)
    if scale is not None:
        y = y * scale.to(row.dtype)
    return y.to(x.dtype).view(1, 1, -1)


class CompiledStep:
    """Compute the logits of one more token after a filled cache, by compiled layers.

    The first call compiles a layer and the head, which takes seconds (less if torch's cache on disk has them). No later
    one compiles again, whatever the length of the text, because positions are dynamic shapes.

    Args:
        network: The network. Its projections multiply by :func:`row_product` when they are compiled.
        backend: As for ``torch.compile``.
    """

    def __init__(self, network: Any, backend: str | Callable = "inductor") -> None:
        allow_compilations()
        self.decoder, self.lm_head = network.model, network.lm_head
        layer, self.head = (
            torch.compile(part, dynamic=True, fullgraph=True, backend=backend) for part in (_layer, _head)
        )
        # Layers with the same shapes share one compiled function, which takes their weights as arguments.
        # That is why _layer takes the layer as an argument: it is the same function for all of them.
        self.layers = [partial(layer, each) for each in self.decoder.layers]

    @staticmethod
    def takes(ids: Tensor, cache: Cache) -> bool:
        """Say whether this step can compute these next tokens (B, T). Lengths 0 and 1 would be compiled separately."""
        # With dynamic=True, torch.compile takes the sizes 0 and 1 for constants and makes other code for them. After a
        # prompt of one token, the second is therefore computed by the plain path, and the step takes over from the
        # third on.
        return ids.shape == (1, 1) and cache.length > 1

    def __call__(self, ids: Tensor, cache: Cache) -> Tensor:
        """Compute the logits (1, 1, V) of the token (1, 1) after those in the cache, and append it to the cache."""
        # As in Decoder.forward, but each layer gets buffers and a position (Slots), of which it changes nothing but the
        # buffers' content. Example: with 7 tokens in the cache, the new one has position 7, its keys go into slot 7.
        x = self.decoder.embed_tokens(ids)
        rotary = self.decoder.rotary(1, like=x, start=cache.length, cache=cache)
        return self.head(self.decoder.norm, self.lm_head, run_layers(self.layers, x, rotary, cache.next_slots(1)))


def _layer(layer: nn.Module, x: Tensor, rotary: Rotary, *received: Tensor) -> Any:
    return layer(x, rotary, *received)


def _head(norm: nn.Module, head: nn.Module, x: Tensor) -> Tensor:
    return head(norm(x))
