"""Exchange plain values between ranks."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch.distributed as dist

from cola_lightning.errors import InputError

Answer = TypeVar("Answer")


def ask_once(question: Callable[[], Answer]) -> Answer:
    """Call ``question`` on rank 0 and return its result on all ranks, so that not every rank asks a server.

    All ranks must call this in the same order. The answer is pickled, by rank 0 of the same run.

    Raises:
        InputError: On the other ranks, if ``question`` raised any exception on rank 0, which raises that itself.
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
    dist.broadcast_object_list(told, src=0, group=cpu_group())
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise InputError(told[1])
    return told[0]


def tell_all(value: Any) -> list[Any]:
    """Return the arguments of all ranks, in the order of ranks. All ranks must call this in the same order."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=cpu_group())
    return values


def cpu_group() -> Any:
    """Return a process group of all ranks on the CPU, whatever device they compute on, so that nothing waits for it."""
    return _group(dist.group.WORLD)


@lru_cache(maxsize=1)
def _group(world: Any) -> Any:
    return dist.new_group(backend="gloo")
