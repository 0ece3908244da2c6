"""Private APIs of DeepSpeed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cola_lightning.private_apis.expected import Expected


@contextmanager
def guard_engine_writers(engine: Any, guard: Callable[[Callable], Callable]) -> Iterator[None]:
    """Let a DeepSpeed engine write each file of a checkpoint through ``guard(write)``.

    ``guard`` gets all writes between two collectives, except that of the last file, before the last collective.
    """
    writers = [(engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")]
    for owner, name in writers:
        setattr(owner, name, guard(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in writers:
            delattr(owner, name)


_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
EXPECTED = (
    Expected(f"{_ENGINE}._copy_recovery_script", "self, save_path"),
    Expected(f"{_ENGINE}._save_zero_checkpoint", mentions=("checkpoint_engine", "_copy_recovery_script")),
)
