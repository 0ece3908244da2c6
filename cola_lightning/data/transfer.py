"""Send batches from a worker process to the training process."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


class SentBatch:
    """A batch on its way to another process, and what belongs to it.

    It is pickled as bytes of int32, half of what its int64 tensors take, and goes through the pipe that PyTorch's
    workers have anyway. A tensor would go through shared memory, for which each process opens sockets and files: 1 ms
    for each tensor, as long as it takes to make several batches out of prepared data, and a /dev/shm that is too small
    in many containers.

    It is a class of its own, because PyTorch would look into a dict or a tuple for tensors, number by number.

    Args:
        batch: Integer tensors by name, each value within int32: ids, labels, numbers of documents.
        states: Plain values that are handed over with it.
    """

    def __init__(self, batch: dict[str, Tensor], states: Any = None) -> None:
        self.batch, self.states = batch, states

    def pin_memory(self, device: Any = None) -> "SentBatch":
        """Copy the tensors to page-locked memory; PyTorch calls this where batches go on to a GPU."""
        return SentBatch({name: tensor.pin_memory() for name, tensor in self.batch.items()}, self.states)

    def __getstate__(self) -> tuple[dict[str, np.ndarray], Any]:
        return {name: tensor.numpy().astype(np.int32) for name, tensor in self.batch.items()}, self.states

    def __setstate__(self, state: tuple[dict[str, np.ndarray], Any]) -> None:
        batch, self.states = state
        self.batch = {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}
