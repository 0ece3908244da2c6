"""Validate a step again if a run was stopped before, or in the middle of, its validation.

A checkpoint of step S is written before the validation of step S, so that nothing is lost if the validation fails, and
a stop does not wait for its end. But Lightning, when it goes on from that checkpoint, assumes that S was validated; and
if S was the last step, it does nothing at all.

So each finished validation is noted in a file beside the checkpoints. Example of a run of 30 steps, with a checkpoint
and a validation every 10:

1. Step 10 is saved and validated; the note says [10].
2. Step 20 is saved. The run is killed while it validates; the note still says [10].
3. The resumed run is at step 20, where a validation is due and which the note lacks: it validates, then the note says
   [10, 20].
4. A run resumed from step 10 instead finds 10 in the note, with what callbacks knew after that validation, and does
   not validate. When it has validated step 20, the note says [10, 20] again.
"""

import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import TypedDict

from cola_lightning.checkpoints.latest import checkpoint_name
from cola_lightning.errors import InputError
from cola_lightning.private_apis.lightning import count_validation_on_resume, is_validation_due, keep_logging_position
from cola_lightning.stored_data import Count, StoredDataError, check_stored
from cola_lightning.training.fit_loop import wrap_next_run
from cola_lightning.training.resumed_settings import keep_patience
from cola_lightning.training.trainer_attributes import callbacks_of, is_fast_dev_run

NOTE = "validated"
"""Name of the file beside the checkpoints. It holds the optimizer steps with a finished validation, and the states of
callbacks after it, such as the best value so far and the patience of EarlyStopping. The checkpoint of the step cannot
hold these states, because it is written before the validation. States are kept for the last validated step, and for
each step with a checkpoint, because a run may go back to that."""


class _Note(TypedDict):
    steps: list[Count]
    callbacks: dict[Count, dict[str, dict[Any, Any]]]
    """By step, then by callback."""


def note_validation(trainer: L.Trainer) -> None:
    """Note that the validation of this step is finished, with the states of the callbacks that it changed.

    Later steps are removed from the note, because the run will make them again. All ranks call this.
    """
    folder = _folder(trainer)
    if not folder or trainer.sanity_checking or trainer.global_step == 0:
        return
    states = _states(trainer)  # on all ranks, because a callback may sum over ranks in ``state_dict``
    if not trainer.is_global_zero:
        return
    # A step after this one is in the note if the run was resumed from an earlier checkpoint, or went back to one. The
    # model of that step will be another, so what is noted of it is void.
    note, now = _read(folder), trainer.global_step
    steps = [step for step in note["steps"] if step < now] + [now]
    # A run can only go back to a step whose checkpoint is there. Example: checkpoints of steps 20 and 30 are left, and
    # step 30 was validated now. Then "steps" is [10, 20, 30], and "callbacks" has the states after 20 and 30.
    kept = {
        step: noted
        for step, noted in note["callbacks"].items()
        if step < now and (folder / checkpoint_name(step)).exists()
    }
    with suppress(OSError, RuntimeError):  # a full disk does not end the run; at worst the step is validated again
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{NOTE}.partial"
        torch.save({"steps": steps, "callbacks": {**kept, now: states}}, partial)
        os.replace(partial, folder / NOTE)


def validated(folder: Path) -> list[int]:
    """Return the steps with a finished validation of the run that has its checkpoints in ``folder``."""
    return _read(folder)["steps"]


def restore_validated(trainer: L.Trainer) -> None:
    """Restore the states that callbacks had after the validation of the step that the run goes on from.

    Without a finished validation of that step, nothing is restored. All ranks call this; rank 0 reads the note.

    Raises:
        InputError: If the note holds a state that a callback cannot load.
    """
    # The run's own note first: it is the newer one, if the checkpoint is of another run's folder.
    states: dict[str, Any] = {}
    for folder in _folders(trainer) if trainer.is_global_zero else []:
        if trainer.global_step in (noted := _read(folder)["callbacks"]):
            states = noted[trainer.global_step]
            break
    states = trainer.strategy.broadcast(states)
    keep_patience(trainer, states)
    for callback in callbacks_of(trainer):
        if callback.state_key in states:
            try:
                callback.load_state_dict(states[callback.state_key])
            except StoredDataError as error:
                raise InputError(f"the file {NOTE} beside the checkpoint {error}; or delete it") from error


def _states(trainer: L.Trainer) -> dict[str, Any]:
    """Return the states of the callbacks that act when a validation ends, if they are plain data."""
    states = {}
    for callback in callbacks_of(trainer):
        # It acts if its class has a method of its own for one of these hooks, as EarlyStopping and ModelCheckpoint do.
        hooks = ("on_validation_end", "on_validation_epoch_end")
        acts = any(getattr(type(callback), hook) is not getattr(L.Callback, hook) for hook in hooks)
        if not acts or not callback.state_dict():
            continue
        # Save and load in memory: a state that ``weights_only`` refuses would make the whole note unreadable. Such a
        # callback gets its state from the checkpoint.
        with suppress(Exception):
            torch.save(callback.state_dict(), content := io.BytesIO())
            content.seek(0)
            states[callback.state_key] = torch.load(content, weights_only=True)
    return states


def _read(folder: Path) -> _Note:
    """Return the note; an empty one if it cannot be read, so that the step is validated again."""
    try:
        note: _Note = torch.load(folder / NOTE, map_location="cpu", weights_only=True)
        check_stored(note, _Note, folder / NOTE, "")
        return note
    except Exception:  # missing, cut short, or no note at all
        return {"steps": [], "callbacks": {}}


def validate_if_pending(trainer: L.Trainer) -> None:
    """Validate the step that the run goes on from if that is pending; all ranks call this before the next step."""
    pending = _is_pending(trainer)
    # Lightning counts the batches of this validation in any case. If it is made here, they must not count twice.
    count_validation_on_resume(trainer, count=not pending)
    if not pending:
        return
    rank_zero_info(f"Validating step {trainer.global_step}, after which the run was stopped")
    loop = trainer.fit_loop.epoch_loop.val_loop
    # As Lightning does around a validation within training: switch the stage, and restore the position of the logger
    # connector, so that values of the next training step are logged as usual.
    with keep_logging_position(trainer):
        trainer.validating = True
        loop.restarting = False  # start with the first batch
        loop.run()
        trainer.training = True


def validate_if_pending_at_end(trainer: L.Trainer) -> None:
    """Validate at the end of ``fit_loop.run`` if that is pending: a run with no step left never starts training."""

    def run(fit: Callable[[], None]) -> None:
        fit()
        validate_if_pending(trainer)

    wrap_next_run(trainer, run)


def _is_pending(trainer: L.Trainer) -> bool:
    folder = _folder(trainer)
    if not trainer.enable_validation or trainer.global_step == 0 or folder is None:
        return False
    due = is_validation_due(trainer)
    finished = any(_is_finished(trainer, _read(each)) for each in _folders(trainer))
    # Rank 0 decides for all ranks, because clocks (validations by time) and disks may differ.
    return trainer.strategy.broadcast(due and not finished)


def _is_finished(trainer: L.Trainer, note: _Note) -> bool:
    """Whether the step was validated and what callbacks knew after that is noted, or is in the checkpoint: one of
    another callback, such as ModelCheckpoint, is written after the validation."""
    # "steps" says that step S was validated, "callbacks" what callbacks knew afterwards. Without the latter, the state
    # must be in the checkpoint. A step_S.ckpt of this package lacks it, because it is written before the validation.
    # Example: the note has step 10, but no states after it. From step_00000010.ckpt, 10 is validated again; from
    # best.ckpt, which a ModelCheckpoint wrote after that validation, it is not.
    step = trainer.global_step
    own = Path(trainer.ckpt_path or "").resolve().name == checkpoint_name(step)
    return step in note["callbacks"] or (step in note["steps"] and not own)


def _folder(trainer: L.Trainer) -> Path | None:
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(folder) if folder and not is_fast_dev_run(trainer) else None


def _folders(trainer: L.Trainer) -> list[Path]:
    """Return the folders that may hold a note: that of this run, and that of the checkpoint it goes on from."""
    folder = _folder(trainer)
    before = [Path(trainer.ckpt_path).resolve().parent] if trainer.ckpt_path else []
    return list(dict.fromkeys([*([folder] if folder else []), *before]))
