"""How the ranks of a run agree while they read data."""

from typing import Any

import torch
import torch.distributed as dist


class OneRank:
    """Exchanges values between ranks; this class is for a single rank. Every rank calls every method in the same
    order."""

    def smallest(self, number: int) -> int:
        """Return the smallest of the ranks' numbers."""
        return number

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in order of rank."""
        return [value]

    def merge(self, states: dict[str, Any]) -> dict[str, Any]:
        """Merge the states that each rank has of its own logical shards into those of all logical shards."""
        return {index: state for of_rank in self.gather(states) for index, state in of_rank.items()}


class AllRanks(OneRank):
    """Exchanges values in a process group on the CPU, so that nothing waits for the device."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo")

    def smallest(self, number: int) -> int:
        value = torch.tensor(number, dtype=torch.int32)
        dist.all_reduce(value, dist.ReduceOp.MIN, group=self.group)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values
