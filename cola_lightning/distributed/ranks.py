"""Ask a question once for all ranks."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch.distributed as dist

from cola_lightning.errors import InputError

Answer = TypeVar("Answer")


def ask_once(question: Callable[[], Answer]) -> Answer:
    """Call ``question`` on rank 0 and tell the others what it returned, so that a server is not asked by every rank.

    All ranks call this in the same order. The answer is pickled by rank 0 of the same run.

    Raises:
        InputError: On all ranks, if the question raised one on rank 0, or anything else there.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return question()
    told: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            told[0] = question()
        except Exception as error:
            failure = error
            told[1] = str(error) if isinstance(error, InputError) else f"rank 0 failed: {type(error).__name__}: {error}"
    dist.broadcast_object_list(told, src=0, group=_group(dist.group.WORLD))
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise InputError(told[1])
    return told[0]


def tell_all(value: Any) -> list[Any]:
    """Gather the argument of every rank, in order of rank. All ranks call it in the same order."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_group(dist.group.WORLD))
    return values


@lru_cache(maxsize=1)
def _group(world: Any) -> Any:
    """A group on the CPU, whatever device the ranks compute on."""
    return dist.new_group(backend="gloo")
