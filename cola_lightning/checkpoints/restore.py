"""Check a checkpoint before a run resumes from it, and explain in one line why it cannot."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import lightning
import torch
from annotated_types import Ge, Len
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed import DistError
from torch.optim import Optimizer
from typing_extensions import TypedDict

from cola_lightning.checkpoints.formats import Format, format_of, read_state
from cola_lightning.errors import InputError, RankError
from cola_lightning.stored_data import ALTERED, Count, StoredDataError, check_stored, shape_of

FLAG = "--weights_only_start"
"""Flag by which a new run begins with the weights of a checkpoint."""
AS_WRITTEN = f"resume with the settings that it was written under, or begin a new run with its weights by {FLAG} true"
"""Remedy for a checkpoint that does not fit the settings of the run."""


def check_complete(path: Path) -> None:
    """Check that a checkpoint has all parts that a run needs to resume. One of only weights does not.

    Raises:
        InputError: With the missing parts, and the flag by which a new run begins with the weights.
    """
    state, missing = read_state(path), []
    match format_of(path):
        case Format.FILE:
            has_optimizer = bool(state.get("optimizer_states"))
        case Format.SHARDS:
            from cola_lightning.checkpoints.shard_index import read_index  # slow to import

            has_optimizer = any(name.startswith("optimizer_") for name in read_index(path).state_dict_metadata)
        case Format.DEEPSPEED:
            has_optimizer = any((path / "checkpoint").glob("*optim_states.pt"))
    if not has_optimizer:
        missing.append("states of the optimizer")
    if not state.get("lr_schedulers"):
        missing.append("a state of the learning-rate schedule")
    if not isinstance(state.get("loops"), Mapping) or "fit_loop" not in state["loops"]:
        missing.append("a count of steps (loops)")
    if missing:
        raise incomplete(path, " nor ".join(missing))


def incomplete(path: Path, missing: str) -> InputError:
    """Make the error for a checkpoint without a part."""
    return InputError(
        f"{path} holds no {missing}, so a run cannot resume from it; begin a new run with its weights by {FLAG} true"
    )


class _Schedule(TypedDict):
    """The state of a learning-rate schedule."""

    last_epoch: Count


class _Progress(TypedDict, total=False):
    """The counts and settings that this package reads from a checkpoint, apart from weights and states."""

    global_step: Count
    callbacks: dict[str, dict[Any, Any]]
    lr_schedulers: list[_Schedule]
    optimizer_classes: list[str]
    optimizer_settings: list[dict[str, Any]]
    micro_batches: Annotated[int, Ge(1)]
    train_loss: Annotated[list[float], Len(2, 2)]


def check_progress(checkpoint: Mapping[str, Any], trainer: "lightning.Trainer") -> None:
    """Check the counts and other plain data of a checkpoint before it is restored.

    Lightning itself accepts any value, and fails with it later, for example in the first validation.

    Args:
        checkpoint: Content of the checkpoint.
        trainer: The trainer that will restore it.

    Raises:
        StoredDataError: For the first value of another type than a run writes.
    """
    check_stored(checkpoint, _Progress, "", ALTERED)
    for schedule in checkpoint.get("lr_schedulers", []):
        if schedule["last_epoch"] > checkpoint["global_step"]:  # Lightning would make its steps again, one by one
            raise StoredDataError(
                f"holds a schedule that is at step {schedule['last_epoch']}, after {checkpoint['global_step']} steps "
                f"of the optimizer; {ALTERED}"
            )
    assert trainer.state.fn is not None, "the trainer runs nothing"
    name = "_".join((trainer.state.fn.value, "loop"))
    loop = getattr(trainer, name)
    if checkpoint.get("loops") is not None:
        # Another release of Lightning may write more or fewer counts, so no key is required here. Lightning itself
        # reports a count that it needs.
        kind = TypedDict("_Loops", {name: shape_of(loop.state_dict(), total=False)})  # type: ignore[misc]
        check_stored(checkpoint["loops"], kind, "in loops", ALTERED)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector of Lightning's
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if isinstance(callback, EarlyStopping) and state is not None:
            check_stored(state, shape_of(callback.state_dict()), f"in callbacks.{callback.state_key}", ALTERED)


@contextmanager
def first_step_explained(path: object) -> Iterator[None]:
    """Turn an error of the optimizer in the first step after a restore into an :class:`InputError` of one line.

    A stored state may have other keys or shapes than the optimizer makes. torch accepts it, and fails in this step.

    Args:
        path: The checkpoint, for the message.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, AssertionError, ValueError, RuntimeError) as error:
        of_machine = (torch.OutOfMemoryError, torch.AcceleratorError)
        if isinstance(error, (InputError, *of_machine)) or lost_connection(error) or not _in_optimizer(error):
            raise
        raise InputError(
            f"{path} holds a state that the optimizer cannot continue from, because it does not fit the run, or was "
            f"altered ({type(error).__name__}: {' '.join(str(error).split())[:300]}); take another checkpoint, or "
            f"{AS_WRITTEN}"
        ) from error


def _in_optimizer(error: BaseException) -> bool:
    """Say whether an error is from an optimizer's step, and not from the forward or backward pass that it calls."""
    # Go from the outermost frame to the innermost, and note which of the two was entered last. Example: Lightning calls
    # the optimizer's step, which calls the closure, which calls training_step. An error in training_step has frames of
    # an optimizer and, after them, one of the closure: it is of the network. One in the update has no later closure.
    inside, trace = False, error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_name
        if isinstance(trace.tb_frame.f_locals.get("self"), Optimizer):
            inside = True
        elif name in ("closure", "training_step", "backward"):
            inside = False
        trace = trace.tb_next
    return inside


@contextmanager
def explain_restore(path: Callable[[], object]) -> Iterator[None]:
    """Turn any error while a checkpoint is restored into an :class:`InputError` of one line.

    A whole checkpoint may still hold data that does not fit the settings of this run. Lightning and torch then fail in
    many ways.

    Args:
        path: Returns the checkpoint, or None if the run begins without one. It is called after an error, because
            Lightning knows the path only when it has begun to restore.
    """
    try:
        yield
    except StoredDataError as error:  # has a line of its own, which may not say in which checkpoint
        if path() is None or str(path()) in str(error):
            raise
        raise InputError(f"{path()} {error}") from error
    except InputError:
        raise
    except Exception as error:
        if path() is None:
            raise
        if lost_connection(error):
            line = f"another process of this run ended while {path()} was restored; its output says why"
            raise RankError(line) from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        reason = reason if len(reason) < 400 else f"{reason[:400]} …"
        raise InputError(f"{path()} does not fit the run, or was altered ({reason}); {AS_WRITTEN}") from error


@contextmanager
def explain_settings() -> Iterator[None]:
    """Turn an error that Lightning raises for incompatible settings into an :class:`InputError` of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if _lightning_refuses(error):
            raise InputError(" ".join(str(error).split())) from error
        raise


def lost_connection(error: Exception) -> bool:
    """Say whether a collective operation failed, because another rank has ended. Gloo raises a plain RuntimeError."""
    by_gloo = re.search(r"gloo/transport/|Connection (closed|reset) by peer", str(error))
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and by_gloo is not None)


def _lightning_refuses(error: Exception) -> bool:
    """Say whether Lightning raised an error for incompatible settings."""
    if isinstance(error, MisconfigurationException):
        return True
    # Lightning also raises ValueError for them, and so do torch and others for faults. It is Lightning's if the
    # innermost frame, where the error was raised, is in a file of Lightning.
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    home = str(Path(lightning.__file__).parent)
    return isinstance(error, ValueError) and trace is not None and trace.tb_frame.f_code.co_filename.startswith(home)
