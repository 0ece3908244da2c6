"""Say in one line why a run cannot go on from a checkpoint."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cola_lightning.checkpoints.formats import Format, format_of, read_state
from cola_lightning.checkpoints.trust import read_index
from cola_lightning.errors import InputError

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


@contextmanager
def restore_explained() -> Iterator[None]:
    """Turn what goes wrong while Lightning restores a checkpoint, whatever it is, into one line; and what Lightning
    itself says of settings that do not go together.

    A checkpoint that is whole may still hold what no run of these settings wrote. Lightning and torch then fail in as
    many ways as there are parts.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if (path := _restored(error)) is None:
            if _lightning_refuses(error):
                raise InputError(" ".join(str(error).split())) from error
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        reason = reason if len(reason) < 400 else f"{reason[:400]} …"
        raise InputError(
            f"{path} does not fit the run, or was altered ({reason}); go on with the settings that it was written "
            f"under, or begin a new run with its weights by {FLAG} true"
        ) from error


def _lightning_refuses(error: Exception) -> bool:
    """Whether Lightning itself raised this, about settings that do not go together."""
    if isinstance(error, MisconfigurationException):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    home = str(Path(lightning.__file__).parent)
    return isinstance(error, ValueError) and trace is not None and trace.tb_frame.f_code.co_filename.startswith(home)


def _restored(error: BaseException) -> Any:
    """The checkpoint that was being restored where an error arose; None if none was."""
    trace = error.__traceback__
    while trace is not None:
        frame: FrameType = trace.tb_frame
        code = frame.f_code
        if code.co_filename.endswith("checkpoint_connector.py") and (
            "restore" in code.co_name or "resume" in code.co_name
        ):
            return frame.f_locals["self"].trainer.ckpt_path
        trace = trace.tb_next
    return None
