"""How the ranks of a run agree while they read data."""

from typing import Any

import torch
import torch.distributed as dist

from cola_lightning.distributed.ranks import cpu_group, tell_all


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
    """Exchanges values between all ranks of the run."""

    def smallest(self, number: int) -> int:
        value = torch.tensor(number, dtype=torch.int32)
        dist.all_reduce(value, dist.ReduceOp.MIN, group=cpu_group())
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        return tell_all(value)
