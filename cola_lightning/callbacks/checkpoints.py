"""When a checkpoint is written, and what happens if it cannot be."""

import time
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cola_lightning.callbacks.checkpoint_retention import (
    free_oldest,
    make_room,
    point_to,
    remove_old,
    says_disk_is_full,
)
from cola_lightning.callbacks.log_lines import write_checkpoint_line
from cola_lightning.checkpoints import lock
from cola_lightning.checkpoints.latest import PARTIAL, checkpoint_name, latest_valid
from cola_lightning.checkpoints.writer import CheckpointWriter, remove
from cola_lightning.errors import InputError, check_at_least
from cola_lightning.private_apis.lightning import (
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
from cola_lightning.training.trainer_attributes import is_fast_dev_run


class UnsavedError(InputError):
    """The last step of a run is not on the disk."""

    exit_status = 1


class Checkpoints(LatestCheckpoint):
    """Write ``step_….ckpt`` every so many optimizer steps, at the end of a run, and when a signal stops it.

    A checkpoint gets its name when all of it is on the disk, so a crash while writing damages no older one.
    ``last.ckpt`` links to the newest. If a checkpoint cannot be written, the run warns and goes on. If the last one
    cannot, the run tries again for ``minutes_at_end`` and then ends with exit status 1. If there is no room for one
    more, the oldest is deleted before the new one is written, but never the newest.

    Args:
        every_n_train_steps: Optimizer steps between two checkpoints.
        keep: How many of the newest stay, 2 or more: if one is damaged, a run can go on from the one before. Files
            with other names, such as those of a ModelCheckpoint, stay.
        dirpath: Folder of the checkpoints; ``checkpoints`` in the run's directory if not given.
        minutes_at_end: Minutes in which the last checkpoint is tried again if it cannot be written.

    Raises:
        InputError: If an argument is out of range, or another run writes to the folder.
        UnsavedError: At the end of a run whose last step could not be saved.
    """

    def __init__(
        self,
        every_n_train_steps: int = 1000,
        keep: int = 2,
        dirpath: str | None = None,
        minutes_at_end: float = 10.0,
    ) -> None:
        check_at_least(1, "--checkpoint.", every_n_train_steps=every_n_train_steps)
        check_at_least(0, "--checkpoint.", minutes_at_end=minutes_at_end)
        if keep < 2:
            raise InputError(
                f"--checkpoint.keep is {keep}; keep at least 2, because what ends a run may damage the newest"
            )
        if dirpath and "://" in dirpath:
            raise InputError(f"--checkpoint.dirpath {dirpath} is not a folder; mount it, or copy from a local one")
        # Lightning knows checkpoint callbacks by the class ModelCheckpoint. All that it does is replaced below.
        super().__init__(dirpath, every_n_train_steps=every_n_train_steps, save_top_k=-1)
        self.every_n_train_steps, self.keep, self.minutes_at_end = every_n_train_steps, keep, minutes_at_end
        self.stop = StopSignal()
        self.writer: CheckpointWriter | None = None
        self._loops: tuple[int, dict[str, Any]] = (-1, {})  # a step, and the state of Lightning's loops after it
        self._listens = False

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.dirpath = trainer.strategy.broadcast(str(self._folder(trainer)))
        if stage != "fit":
            return
        own_signals(trainer)
        self._listens = LISTENER.listen() or self._listens  # the command line may listen already
        self._lock(trainer)
        if self.writer is None or self.writer.trainer is not trainer:
            self.writer = CheckpointWriter(trainer)
        if trainer.is_global_zero:
            # A run that was killed while it wrote left a file such as step_00000020.ckpt.partial.
            for leftover in Path(self.dirpath).glob(f"*{PARTIAL}"):
                with suppress(OSError):
                    remove(leftover)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        validate_if_pending_at_end(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop.install(trainer)
        if self.writer:
            self.writer.group = self.stop.group
        self.last_saved_step = trainer.global_step  # 0, or the step that the run goes on from
        restore_validated(trainer)
        validate_if_pending(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_accumulating(trainer) or is_fast_dev_run(trainer):
            return  # within a step, a checkpoint would lose the gradients accumulated so far
        # 1. Save the last step, and every ``every_n_train_steps``.
        if self._ends(trainer) or trainer.global_step % self.every_n_train_steps == 0:
            self.save(trainer)
        # 2. If this step was not saved and may turn out to be the last, keep the state of the loops: when
        #    ``on_train_end`` saves the step, a validation or the end of the epoch has changed them.
        if trainer.global_step != self.last_saved_step and self._may_end(trainer):
            self._loops = trainer.global_step, deepcopy(trainer.fit_loop.state_dict())
        # 3. If all ranks know of a signal, save this step and stop.
        if number := self.stop.agreed():
            self.save(trainer)
            self._end(trainer, number)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop within a validation if its step is saved; the resumed run makes the validation again.

        If its step is not saved, the validation is finished first, and the next step is saved.
        """
        if trainer.global_step == self.last_saved_step and (number := self.stop.agreed()):
            self._end(trainer, number)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        note_validation(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step, if it was not known to be the last when it was made, or could not be saved then."""
        if trainer.global_step and not is_fast_dev_run(trainer):
            self.save(trainer, at_end=True)
        LISTENER.phase = Phase.ENDING

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the loops as they were right after the step, if a validation or the end of the epoch came since.

        So a checkpoint is the same whether it was written right after the step or at the end of the run.
        """
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
        """Return whether the step just made is the last, as far as is known now."""
        loop = trainer.fit_loop
        progress: Any = loop.epoch_progress.current
        epochs = loop.max_epochs
        # Lightning counts an epoch as processed when it is over, so the one under way is not in it. Example: in the
        # last of 3 epochs, 2 are processed.
        last_epoch = epochs is not None and epochs != -1 and progress.processed + 1 >= epochs
        over = last_epoch and is_last_batch(trainer)
        return trainer.should_stop or trainer.global_step == trainer.max_steps or over

    def _may_end(self, trainer: L.Trainer) -> bool:
        """Return whether the run may end before another step.

        It may if a validation follows, because a callback such as EarlyStopping may stop the run after it. Validations
        by time may follow any step.
        """
        return self._ends(trainer) or validates_by_time(trainer) or is_validation_due(trainer)

    def _end(self, trainer: L.Trainer, number: int) -> NoReturn:
        saved = trainer.global_step == self.last_saved_step
        how = "go on with --ckpt_path last" if saved else f"step {trainer.global_step} could not be saved"
        rank_zero_info(f"Stopping after step {trainer.global_step}, because signal {number} was received; {how}")
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

    _saving_at_end = False  # while on_train_end saves; on_save_checkpoint, which is called within, asks for it

    def save(self, trainer: L.Trainer, at_end: bool = False) -> None:
        """Write a checkpoint of the step just made, unless there is one; all ranks call this.

        Raises:
            UnsavedError: At the end of a run, if it could not be written for ``minutes_at_end``.
        """
        if self.last_saved_step == trainer.global_step:
            return
        # 1. Write it.
        if not at_end:
            log_step_now(trainer)  # a run that goes on from this checkpoint does not log this step again
        path = Path(self.dirpath or "", checkpoint_name(trainer.global_step))
        self._saving_at_end = at_end
        try:
            problem = self._save_with_retries(trainer, path) if at_end else self._try_save(trainer, path)
        finally:
            self._saving_at_end = False
        # 2. A problem ends the run only if no later step can be saved in its place.
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
        # 3. Note what is on the disk now.
        self.last_saved_step = trainer.global_step
        self.best_model_path = self.last_model_path = str(path)
        write_checkpoint_line(trainer, f"{path.parent.name}/{path.name}")

    def _save_with_retries(self, trainer: L.Trainer, path: Path) -> str | None:
        """Try for ``minutes_at_end``, with pauses of 1, 2, 4 … 30 s; return the last error, or None when saved."""
        began, pause = time.monotonic(), 1.0
        while problem := self._try_save(trainer, path):
            # Rank 0's clock decides, because all ranks must try equally often. A signal ends the trying, too.
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
            make_room(path.parent, self.keep)
        problem = self.writer.try_save(path)
        # ``make_room`` cannot see a quota, which shows only when writing fails. Then free the oldest and try again. The
        # problem is the same on all ranks, so all come to the broadcast, by which rank 0 says whether it freed one.
        if says_disk_is_full(problem) and trainer.strategy.broadcast(
            trainer.is_global_zero and free_oldest(path.parent, self.keep)
        ):
            problem = self.writer.try_save(path)
        if problem is None and trainer.is_global_zero:
            point_to(path)
            remove_old(path.parent, self.keep)
        trainer.strategy.barrier("checkpoint")
        return problem

    # -- going on -----------------------------------------------------------------------------------------------------

    def _folder(self, trainer: L.Trainer) -> Path:
        return Path(self.dirpath or run_folder(trainer) / "checkpoints").absolute()

    def latest(self, trainer: L.Trainer) -> Path | None:
        return latest_valid(self._folder(trainer))

    def state_dict(self) -> dict[str, Any]:
        return {}  # what is in the folder counts, which may have been moved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
