"""When a checkpoint is written, where, and how many stay."""

import errno
import os
import shutil
import time
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cola_lightning.checkpoints import lock
from cola_lightning.checkpoints.latest import LINK, PARTIAL, checkpoint_name, latest_valid, step_of, written
from cola_lightning.checkpoints.writer import CheckpointWriter, remove, size
from cola_lightning.errors import InputError
from cola_lightning.private_apis import (
    LatestCheckpoint,
    is_accumulating,
    is_last_batch,
    is_validation_due,
    log_step_now,
    validates_by_time,
)
from cola_lightning.provenance import run_folder
from cola_lightning.signals import LISTENER, Phase
from cola_lightning.training.pending_validation import (
    note_validation,
    restore_validated,
    validate_if_pending,
    validate_if_pending_at_end,
)
from cola_lightning.training.preemption import Preempted, StopSignal, own_signals, requeue

_FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)] + ["PytorchStreamWriter failed"]
"""How a disk says that it is full, also through torch's zip writer."""


class UnsavedError(InputError):
    """A run whose last step is not on the disk."""

    exit_status = 1


class Checkpoints(LatestCheckpoint):
    """Writes ``step_….ckpt`` every so many optimizer steps, at the end of a run however it ends, and when a signal asks
    it to stop.

    A checkpoint appears under its name when every byte of it is on the disk, and after what its step logs; a crash
    while writing leaves those before it as they were. ``last.ckpt`` is a link to the newest. If one cannot be written,
    the run says so and goes on. If the last cannot, the run tries again for ``minutes_at_end`` and then ends with exit
    status 1. Where there is no room for one more, the oldest goes before the new one is written, but never the newest.

    Args:
        every_n_train_steps: Optimizer steps between two checkpoints.
        keep: How many of the newest stay, 2 or more: if one is damaged, the run goes on from the one before. Files
            that are not named ``step_….ckpt``, such as those of a ModelCheckpoint, are left alone.
        dirpath: Folder, local or mounted; ``checkpoints`` in the run's directory if not given.
        minutes_at_end: How long the last checkpoint is tried again if it cannot be written.

    Raises:
        InputError: If one of these makes no sense, or another run writes to the folder.
        UnsavedError: At the end of a run whose last step could not be saved.
    """

    def __init__(
        self,
        every_n_train_steps: int = 1000,
        keep: int = 2,
        dirpath: str | None = None,
        minutes_at_end: float = 10.0,
    ) -> None:
        if every_n_train_steps < 1:
            raise InputError(f"--checkpoint.every_n_train_steps is {every_n_train_steps}; it must be at least 1")
        if keep < 2:
            raise InputError(
                f"--checkpoint.keep is {keep}; keep at least 2, for the newest may be damaged by what ended the run"
            )
        if dirpath and "://" in dirpath:
            raise InputError(f"--checkpoint.dirpath {dirpath} is not a folder; mount it, or copy from a local one")
        if not minutes_at_end >= 0:
            raise InputError(f"--checkpoint.minutes_at_end is {minutes_at_end}; it must be 0 or more")
        # Lightning knows a ModelCheckpoint by its class; what it does is all replaced below.
        super().__init__(dirpath, every_n_train_steps=every_n_train_steps, save_top_k=-1)
        self.every_n_train_steps, self.keep, self.minutes_at_end = every_n_train_steps, keep, minutes_at_end
        self.stop = StopSignal()
        self.writer: CheckpointWriter | None = None
        self._loops: tuple[int, dict[str, Any]] = (-1, {})
        self._listens = False

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.dirpath = trainer.strategy.broadcast(str(self._folder(trainer)))
        if stage != "fit":
            return
        own_signals(trainer)
        self._listens = LISTENER.listen() or self._listens  # else the command line does
        self._lock(trainer)
        if self.writer is None or self.writer.trainer is not trainer:
            self.writer = CheckpointWriter(trainer)
        if trainer.is_global_zero:
            for leftover in Path(self.dirpath).glob(f"*{PARTIAL}"):
                with suppress(OSError):
                    remove(leftover)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        validate_if_pending_at_end(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop.install(trainer)
        if self.writer:
            self.writer.group = self.stop.group
        self.last_saved_step = trainer.global_step  # where the run goes on from, if it does
        restore_validated(trainer)
        validate_if_pending(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_accumulating(trainer) or trainer.fast_dev_run:
            return  # between two steps a checkpoint would lose the gradient gathered so far
        if self._ends(trainer) or trainer.global_step % self.every_n_train_steps == 0:
            self.save(trainer)
        if trainer.global_step != self.last_saved_step and self._may_end(trainer):
            self._loops = trainer.global_step, deepcopy(trainer.fit_loop.state_dict())
        if number := self.stop.agreed():
            self.save(trainer)
            self._end(trainer, number)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Wait for a validation's end only where its step has a checkpoint; one that is broken off is made up for."""
        if trainer.global_step == self.last_saved_step and (number := self.stop.agreed()):
            self._end(trainer, number)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        note_validation(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step, if that was not known to be the last when it was made, or could not be saved then."""
        if trainer.global_step and not trainer.fast_dev_run:
            self.save(trainer, at_end=True)
        LISTENER.phase = Phase.ENDING

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the loops as they were after the step, where a validation or the end of the epoch has come since: a run
        goes on from there, and it makes no difference when the checkpoint was written."""
        step, loops = self._loops
        if step == trainer.global_step and self._saving_at_end:
            checkpoint["loops"]["fit_loop"] = loops

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            lock.release()
        self._unlisten()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._unlisten()

    def _ends(self, trainer: L.Trainer) -> bool:
        """Whether the step just made is the last, as far as is known now."""
        loop = trainer.fit_loop
        last_epoch = loop.max_epochs not in (None, -1) and loop.epoch_progress.current.processed + 1 >= loop.max_epochs
        over = last_epoch and is_last_batch(trainer)
        return trainer.should_stop or trainer.global_step == trainer.max_steps or over

    def _may_end(self, trainer: L.Trainer) -> bool:
        """Whether the run may end before another step: it should, or a validation comes, after which a callback may
        stop it. Validations by the clock may come after any step."""
        return self._ends(trainer) or validates_by_time(trainer) or is_validation_due(trainer)

    def _end(self, trainer: L.Trainer, number: int) -> NoReturn:
        saved = trainer.global_step == self.last_saved_step
        how = "go on with --ckpt_path last" if saved else f"step {trainer.global_step} could not be saved"
        rank_zero_info(f"Stopping after step {trainer.global_step}, for signal {number} was received; {how}")
        if trainer.is_global_zero:
            requeue(number)
        if LISTENER.listening:
            LISTENER.end_soon(number)
        raise Preempted(number, trainer.global_rank)

    def _unlisten(self) -> None:
        if self._listens:
            LISTENER.unlisten()
            self._listens = False

    def _lock(self, trainer: L.Trainer) -> None:
        problem = None
        if trainer.is_global_zero:
            try:
                lock.lock(Path(self.dirpath or ""))
            except InputError as error:
                problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            raise InputError(problem)

    # -- how ----------------------------------------------------------------------------------------------------------

    _saving_at_end = False

    def save(self, trainer: L.Trainer, at_end: bool = False) -> None:
        """Write a checkpoint of the step just made, unless there is one; all ranks take part.

        Raises:
            UnsavedError: At the end of a run, if it cannot be written for as long as stated.
        """
        if self.last_saved_step == trainer.global_step:
            return
        if not at_end:
            log_step_now(trainer)  # because a run that goes on from this checkpoint will not
        path = Path(self.dirpath or "", checkpoint_name(trainer.global_step))
        self._saving_at_end = at_end
        try:
            problem = self._save_with_retries(trainer, path) if at_end else self._try_save(trainer, path)
        finally:
            self._saving_at_end = False
        newest = self.last_model_path or "none"
        if problem and at_end:
            raise UnsavedError(
                f"step {trainer.global_step}, the last of this run, is not on the disk: {path} could not be written "
                f"for {self.minutes_at_end:g} minutes: {problem}. The newest checkpoint is {newest}; make room, and "
                "make the steps after it again by --ckpt_path last"
            )
        if problem:
            again = "at its end" if self._ends(trainer) else f"in {self.every_n_train_steps} steps"
            rank_zero_warn(
                f"{path} could not be written: {problem}. The run goes on and tries again {again}; the newest "
                f"checkpoint is {newest}"
            )
            return
        self.last_saved_step = trainer.global_step
        self.best_model_path = self.last_model_path = str(path)

    def _save_with_retries(self, trainer: L.Trainer, path: Path) -> str | None:
        began, pause = time.monotonic(), 1.0
        while problem := self._try_save(trainer, path):
            left = trainer.strategy.broadcast(self.minutes_at_end * 60 - (time.monotonic() - began))
            if left <= 0 or self.stop.agreed():
                return problem
            if pause == 1.0:
                rank_zero_warn(
                    f"{path} could not be written: {problem}. It is of the run's last step, so it is tried again for "
                    f"{self.minutes_at_end:g} minutes"
                )
            time.sleep(min(pause, left))
            pause = min(2 * pause, 30.0)
        return None

    def _try_save(self, trainer: L.Trainer, path: Path) -> str | None:
        assert self.writer is not None
        if trainer.is_global_zero:
            self._make_room(path.parent)
        problem = self.writer.try_save(path)
        full = problem is not None and any(words in problem for words in _FULL)  # a quota shows only by writing
        if full and trainer.strategy.broadcast(trainer.is_global_zero and self._free_oldest(path.parent)):
            problem = self.writer.try_save(path)
        if problem is None and trainer.is_global_zero:
            self._point_to(path)
            self._remove_old(path.parent)
        trainer.strategy.barrier("checkpoint")
        return problem

    def _make_room(self, folder: Path) -> None:
        """Remove the oldest checkpoint beforehand, where a new one has no room without that and has with it."""
        with suppress(OSError):
            found = written(folder)
            if len(found) >= self.keep:
                free, needed = shutil.disk_usage(folder).free, size(found[0])
                if free < 1.05 * needed <= free + size(found[-1]):
                    self._free_oldest(folder)

    def _free_oldest(self, folder: Path) -> bool:
        with suppress(OSError):
            found = written(folder)
            if len(found) >= self.keep:
                rank_zero_warn(f"{folder} is full: {found[-1].name} is removed before a newer checkpoint is written")
                remove(found[-1])
                return True
        return False

    def _point_to(self, path: Path) -> None:
        """Let the link name this checkpoint. One that cannot be changed goes, because without it the steps count."""
        link = path.with_name(LINK)
        try:
            if not link.is_symlink() and link.exists():  # a copy whose links were followed: keep it by its step
                own = path.with_name(checkpoint_name(max(0, step_of(link) or 0)))
                if own.exists():
                    remove(link)
                else:
                    os.replace(link, own)
            fresh = link.with_name(LINK + PARTIAL)
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(path.name)
            os.replace(fresh, link)
        except OSError as error:
            rank_zero_warn(f"{link} could not be changed ({error}); the newest checkpoint is {path}")
            with suppress(OSError):
                if link.is_symlink():
                    link.unlink()

    def _remove_old(self, folder: Path) -> None:
        try:
            for old in written(folder)[self.keep :]:
                remove(old)
        except OSError as error:
            rank_zero_warn(f"an old checkpoint in {folder} could not be removed ({error}); it is tried again")

    # -- going on -----------------------------------------------------------------------------------------------------

    def _folder(self, trainer: L.Trainer) -> Path:
        return Path(self.dirpath or run_folder(trainer) / "checkpoints").absolute()

    def latest(self, trainer: L.Trainer) -> Path | None:
        return latest_valid(self._folder(trainer))

    def state_dict(self) -> dict[str, Any]:
        return {}  # the folder says it all, also where it was moved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
