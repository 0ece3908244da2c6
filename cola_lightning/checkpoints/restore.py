"""Say in one line why a run cannot go on from a checkpoint."""

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
from cola_lightning.checkpoints.safe_unpickle import read_index
from cola_lightning.errors import InputError, RankError
from cola_lightning.stored_data import ALTERED, Count, StoredDataError, check_stored, shape_of

FLAG = "--weights_only_start"


def check_complete(path: Path) -> None:
    """Look whether a checkpoint holds all that a run needs to go on: not one of weights alone, or of another program.

    Raises:
        InputError: Names what is missing, and the flag by which a new run begins with the weights.
    """
    state, missing = read_state(path), []
    if not isinstance(state, Mapping):
        raise InputError(f"{path} holds no checkpoint of a run, but a {type(state).__name__}")
    match format_of(path):
        case Format.FILE:
            has_optimizer = bool(state.get("optimizer_states"))
        case Format.SHARDS:
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
    """The error of a checkpoint that lacks something."""
    return InputError(
        f"{path} holds no {missing}, without which a run cannot go on as it was; begin a new run with its weights by "
        f"{FLAG} true"
    )


class _Schedule(TypedDict):
    last_epoch: Count


class _Progress(TypedDict, total=False):
    """The counts and settings that this package reads from a checkpoint, beside weights and states."""

    global_step: Count
    callbacks: dict[str, dict[Any, Any]]
    lr_schedulers: list[_Schedule]
    optimizer_settings: list[dict[str, Any]]
    micro_batches: Annotated[int, Ge(1)]
    train_loss: Annotated[list[float], Len(2, 2)]


def check_progress(checkpoint: Mapping[str, Any], trainer: "lightning.Trainer") -> None:
    """Check the counts of a checkpoint that is about to be restored, and what else is plain data of known shape.

    Lightning takes over any value, and fails with it later: after an epoch, or in the first validation.

    Raises:
        StoredDataError: Names the first that is of another shape than a run writes.
    """
    check_stored(checkpoint, _Progress, "", ALTERED)
    for schedule in checkpoint.get("lr_schedulers", []):
        if schedule["last_epoch"] > checkpoint["global_step"]:  # its steps are made again one by one
            raise StoredDataError(
                f"holds a schedule that is at step {schedule['last_epoch']}, after {checkpoint['global_step']} steps "
                f"of the optimizer; {ALTERED}"
            )
    loops = {
        "fit": ("fit_loop", trainer.fit_loop),
        "validate": ("validate_loop", trainer.validate_loop),
        "test": ("test_loop", trainer.test_loop),
        "predict": ("predict_loop", trainer.predict_loop),
    }
    name, loop = loops[trainer.state.fn.value]
    if checkpoint.get("loops") is not None:
        # Another release may write more or fewer counts; Lightning says which of them it cannot do without.
        kind = TypedDict("_Loops", {name: shape_of(loop.state_dict(), total=False)})  # type: ignore[misc]
        check_stored(checkpoint["loops"], kind, "in loops", ALTERED)
    for callback in trainer.callbacks:
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if isinstance(callback, EarlyStopping) and state is not None:
            check_stored(state, shape_of(callback.state_dict()), f"in callbacks.{callback.state_key}", ALTERED)


@contextmanager
def first_step_explained(path: object) -> Iterator[None]:
    """Turn an error of the optimizer itself, in the first step after its state was restored, into one line. A state may
    hold another key or shape than the optimizer makes, which torch takes over and stumbles over here."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, AssertionError, ValueError, RuntimeError) as error:
        of_machine = (torch.OutOfMemoryError, torch.AcceleratorError)
        if isinstance(error, (InputError, *of_machine)) or _lost_connection(error) or not _in_optimizer(error):
            raise
        raise InputError(
            f"{path} holds a state that the optimizer cannot go on from ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); {ALTERED}"
        ) from error


def _in_optimizer(error: BaseException) -> bool:
    """Whether it arose in an optimizer's step, and not in the forward or backward pass that the step calls."""
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
    """Turn what goes wrong while a checkpoint is restored, whatever it is, into one line.

    A checkpoint that is whole may still hold what no run of these settings wrote. Lightning and torch then fail in as
    many ways as there are parts.

    Args:
        path: Returns the checkpoint, or None where a run begins without one. It is asked when an error has occurred,
            because Lightning knows the path only once it has begun to restore.
    """
    try:
        yield
    except StoredDataError as error:
        if path() is None or str(path()) in str(error):
            raise
        raise InputError(f"{path()} {error}") from error
    except InputError:
        raise
    except Exception as error:
        if path() is None:
            raise
        if _lost_connection(error):
            line = f"another process of this run ended while {path()} was restored; its output says why"
            raise RankError(line) from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        reason = reason if len(reason) < 400 else f"{reason[:400]} …"
        raise InputError(
            f"{path()} does not fit the run, or was altered ({reason}); go on with the settings that it was written "
            f"under, or begin a new run with its weights by {FLAG} true"
        ) from error


@contextmanager
def explain_settings() -> Iterator[None]:
    """Turn what Lightning itself says of settings that do not go together into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if _lightning_refuses(error):
            raise InputError(" ".join(str(error).split())) from error
        raise


def _lost_connection(error: Exception) -> bool:
    """Whether a collective operation failed, as where another rank is gone. Gloo tells it by a plain RuntimeError."""
    by_gloo = re.search(r"gloo/transport/|Connection (closed|reset) by peer", str(error))
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and by_gloo is not None)


def _lightning_refuses(error: Exception) -> bool:
    """Whether Lightning itself raised this, about settings that do not go together."""
    if isinstance(error, MisconfigurationException):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    home = str(Path(lightning.__file__).parent)
    return isinstance(error, ValueError) and trace is not None and trace.tb_frame.f_code.co_filename.startswith(home)
