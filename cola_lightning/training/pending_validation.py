"""The validation that a run was stopped before, or in the middle of.

The checkpoint of a step is written before its validation, so that nothing is lost if that fails, and a stop need not
wait for its end. But Lightning, going on from there, takes it as made; and with the last step made it does nothing.
"""

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import TypedDict

from cola_lightning.errors import InputError
from cola_lightning.private_apis import count_validation_on_resume, is_validation_due, keep_logging_position
from cola_lightning.stored_data import Count, StoredDataError, check_stored
from cola_lightning.training.resumed_settings import keep_patience

NOTE = "validated"
"""File beside the checkpoints: the optimizer steps whose validation came to its end, and what callbacks made of it.

The checkpoint of a step is written before its validation, and the next may be far: a run that is killed between the two
would not validate the step again, and would have lost the best value so far, or how long there was none better."""


class _Note(TypedDict):
    steps: list[Count]
    callbacks: dict[str, dict[Any, Any]]


def note_validation(trainer: L.Trainer) -> None:
    """Write down that the validation of this step is over, together with the states of the callbacks that it changed,
    and strike out later steps, which will be made again."""
    folder = _folder(trainer)
    if not folder or trainer.sanity_checking or trainer.global_step == 0:
        return
    states = _states(trainer)  # on all ranks, because a callback may add up what each of them has
    if not trainer.is_global_zero:
        return
    steps = [step for step in validated(folder) if step < trainer.global_step] + [trainer.global_step]
    with suppress(OSError, RuntimeError):  # a full disk does not end the run, which at worst validates the step again
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{NOTE}.partial"
        torch.save({"steps": steps, "callbacks": states}, partial)
        os.replace(partial, folder / NOTE)


def validated(folder: Path) -> list[int]:
    """The steps whose validation is over, of the run whose checkpoints are in ``folder``."""
    return list(_read(folder).get("steps", []))


def restore_validated(trainer: L.Trainer) -> None:
    """Give callbacks back what they made of the validation of the step that the run goes on from, if it was made; all
    ranks take part."""
    states: dict[str, Any] = {}
    for folder in _folders(trainer) if trainer.is_global_zero else []:
        note = _read(folder)
        if note.get("steps", [])[-1:] == [trainer.global_step]:
            states = note["callbacks"]
            break
    states = trainer.strategy.broadcast(states)
    keep_patience(trainer, states)
    for callback in trainer.callbacks:
        if callback.state_key in states:
            try:
                callback.load_state_dict(states[callback.state_key])
            except StoredDataError as error:
                raise InputError(f"the file {NOTE} beside the checkpoint {error}; or delete it") from error


def _states(trainer: L.Trainer) -> dict[str, Any]:
    """States of the callbacks that do something at a validation's end, as far as they are plain data."""
    states = {}
    for callback in trainer.callbacks:
        kind = type(callback)
        hooks = ("on_validation_end", "on_validation_epoch_end")
        if any(getattr(kind, hook) is not getattr(L.Callback, hook) for hook in hooks) and callback.state_dict():
            with suppress(Exception):  # of what may not be loaded again, the checkpoint's state counts
                torch.save(callback.state_dict(), content := io.BytesIO())
                content.seek(0)
                states[callback.state_key] = torch.load(content, weights_only=True)
    return states


def _read(folder: Path) -> dict[str, Any]:
    """The note; empty where there is none that can be read, so that the step is validated again."""
    try:
        note = torch.load(folder / NOTE, map_location="cpu", weights_only=True)
        check_stored(note, _Note, folder / NOTE, "")
        return note
    except Exception:  # missing, cut short, or something else
        return {}


def validate_if_pending(trainer: L.Trainer) -> None:
    """Run the validation that was due before the next step, if it was not made; all ranks take part."""
    pending = _is_due(trainer)
    count_validation_on_resume(trainer, count=not pending)
    if not pending:
        return
    rank_zero_info(f"Validating step {trainer.global_step}, after which the run was stopped")
    loop = trainer.fit_loop.epoch_loop.val_loop
    with keep_logging_position(trainer):
        trainer.validating = True
        loop.restarting = False
        loop.run()
        trainer.training = True


def validate_if_pending_at_end(trainer: L.Trainer) -> None:
    """Have it made up at the end of fitting, which with no step left to make is at once."""
    loop = trainer.fit_loop

    def run() -> None:
        vars(loop).pop("run", None)
        loop.run()
        validate_if_pending(trainer)

    vars(loop)["run"] = run


def _is_due(trainer: L.Trainer) -> bool:
    folder = _folder(trainer)
    if not trainer.enable_validation or trainer.global_step == 0 or folder is None:
        return False
    due = is_validation_due(trainer)
    made = any(trainer.global_step in validated(each) for each in _folders(trainer))
    return trainer.strategy.broadcast(due and not made)  # by rank 0's clock, where validations go by time, and its disk


def _folder(trainer: L.Trainer) -> Path | None:
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(folder) if folder and not trainer.fast_dev_run else None


def _folders(trainer: L.Trainer) -> list[Path]:
    """Where validations may be noted. A run that goes on in another folder has its own beside the checkpoint that it
    came from."""
    folder = _folder(trainer)
    before = [Path(trainer.ckpt_path).resolve().parent] if trainer.ckpt_path else []
    return list(dict.fromkeys([*([folder] if folder else []), *before]))
