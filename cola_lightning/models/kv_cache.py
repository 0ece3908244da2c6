"""The KV cache: keys and values of past tokens, kept so that generation computes each token once."""

from typing import NamedTuple, Protocol

from torch import Tensor


class KeyValueStore(Protocol):
    """Keys and values of one layer, as attention uses them."""

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of the next tokens (B, K, T, E); return all so far (B, K, length, E)."""


class LayerCache:
    """Keys and values of one layer, each (B, K, capacity + 1, E); the first ``length`` tokens of them are filled."""

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of the next tokens (B, K, T, E); return all so far (B, K, length, E)."""
        if not self.length:  # allocate now, because dtype and device are not known earlier
            # One token more than is ever filled: a compiled step would be compiled again for a buffer that is full.
            self.keys, self.values = (x.new_empty(*x.shape[:2], self.capacity + 1, x.shape[3]) for x in (k, v))
        begin, self.length = self.length, self.length + k.shape[2]
        return Slots(self.keys, self.values, begin).extend(k, v)


class Slots(NamedTuple):
    """Buffers of one layer (B, K, capacity + 1, E), and the position at which the next tokens go into them.

    This is what a compiled step takes: nothing of it changes but the content of the buffers.
    """

    keys: Tensor
    values: Tensor
    begin: int

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of the next tokens (B, K, T, E); return all so far (B, K, length, E)."""
        end = self.begin + k.shape[2]
        self.keys[:, :, self.begin : end] = k
        self.values[:, :, self.begin : end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


class Cache:
    """Keys and values of every layer.

    Args:
        layers: Number of decoder layers.
        capacity: Most tokens that it can hold, prompt and continuation together.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.table: tuple[Tensor, Tensor] | None = None  # cosine and sine of all positions, each (capacity, E)
        self.layers = [LayerCache(capacity) for _ in range(layers)]

    @property
    def length(self) -> int:
        """Number of tokens that it holds."""
        return self.layers[-1].length

    def next_slots(self, count: int) -> list[Slots]:
        """Make room for ``count`` more tokens in each layer, which its first call filled; return where they go."""
        begin = self.length
        for layer in self.layers:
            layer.length = begin + count
        return [Slots(layer.keys, layer.values, begin) for layer in self.layers]
