"""The KV cache: keys and values of past tokens, kept so that generation computes each token once."""

from torch import Tensor


class LayerCache:
    """Keys and values of one layer, each (B, K, capacity, E); the first ``length`` tokens of them are filled."""

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of the next tokens (B, K, T, E); return all so far (B, K, length, E)."""
        if not self.length:  # allocate now, because dtype and device are not known earlier
            self.keys, self.values = (x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (k, v))
        begin, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, begin : self.length] = k
        self.values[:, :, begin : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Cache:
    """Keys and values of every layer.

    Args:
        layers: Number of decoder layers.
        capacity: Most tokens that it can hold, prompt and continuation together.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(layers)]

    @property
    def length(self) -> int:
        """Number of tokens that it holds."""
        return self.layers[-1].length
