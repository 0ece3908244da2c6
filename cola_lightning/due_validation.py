"""The validation that a run was stopped before, or in the middle of.

The checkpoint of a step is written before its validation, so that nothing is lost if that fails, and a stop need not
wait for its end. But Lightning, going on from there, takes it as made; and with the last step made it does nothing.
"""

from contextlib import suppress
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

NOTE = "validated"
"""File beside the checkpoints: the optimizer steps whose validation came to its end, one a line."""


def note_validation(trainer: L.Trainer) -> None:
    """Write down that the validation of this step is over, and strike out later steps, which will be made again."""
    folder = _folder(trainer)
    if not folder or not trainer.is_global_zero or trainer.sanity_checking or trainer.global_step == 0:
        return
    steps = [step for step in validated(folder) if step < trainer.global_step] + [trainer.global_step]
    with suppress(OSError):  # a full disk does not end the run, which at worst validates the step again
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NOTE).write_text("".join(f"{step}\n" for step in steps), encoding="utf-8")


def validated(folder: Path) -> list[int]:
    """The steps whose validation is over, of the run whose checkpoints are in ``folder``."""
    file = folder / NOTE
    return [int(line) for line in file.read_text(encoding="utf-8").split()] if file.is_file() else []


def validate_if_due(trainer: L.Trainer) -> None:
    """Make it up, before the next step; all ranks take part."""
    if not _is_due(trainer):
        return
    rank_zero_info(f"Validating step {trainer.global_step}, after which the run was stopped")
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    first = connector._first_loop_iter
    trainer.validating = True
    loop.restarting = False
    loop.run()
    trainer.training = True
    connector._first_loop_iter = first


def validate_if_due_at_end(trainer: L.Trainer) -> None:
    """Have it made up at the end of fitting, which with no step left to make is at once."""
    loop = trainer.fit_loop

    def run() -> None:
        vars(loop).pop("run", None)
        loop.run()
        validate_if_due(trainer)

    vars(loop)["run"] = run


def _is_due(trainer: L.Trainer) -> bool:
    loop, folder = trainer.fit_loop, _folder(trainer)
    if not trainer.enable_validation or trainer.global_step == 0 or folder is None:
        return False
    due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # of which it asks the type alone
    # A run that goes on in another folder has its validations noted beside the checkpoint that it came from.
    folders = {folder, Path(trainer.ckpt_path).resolve().parent} if trainer.ckpt_path else {folder}
    made = any(trainer.global_step in validated(each) for each in folders)
    return trainer.strategy.broadcast(due and not made)  # by rank 0's clock, where validations go by time, and its disk


def _folder(trainer: L.Trainer) -> Path | None:
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(folder) if folder and not trainer.fast_dev_run else None
