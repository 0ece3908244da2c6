"""When a checkpoint is written, where, and how many stay."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import distributed
from torch.distributed.checkpoint import CheckpointException

from cola_lightning.checkpoints.integrity import checksum, contents, seal, sync
from cola_lightning.checkpoints.newest import LINK, PARTIAL, newest_whole, written
from cola_lightning.due_validation import note_validation, validate_if_due, validate_if_due_at_end
from cola_lightning.errors import InputError
from cola_lightning.preemption import Preempted, StopSignal, requeue


class Checkpoints(ModelCheckpoint):
    """Writes ``step_….ckpt`` every so many optimizer steps, at the end of a run, and on SIGTERM and SIGUSR1.

    A checkpoint appears under its name when every byte of it is on the disk, and after what its step logs; a crash
    while writing leaves those before it as they were. ``last.ckpt`` is a link to the newest. If the disk is full, the
    run says so and goes on.

    Args:
        every_n_train_steps: Optimizer steps between two checkpoints.
        keep: How many of the newest stay, 2 or more: if one is damaged, the run goes on from the one before.
        dirpath: Folder, local or mounted; ``checkpoints`` in the run's directory if not given.

    Raises:
        InputError: If one of these makes no sense.
    """

    def __init__(self, every_n_train_steps: int = 1000, keep: int = 2, dirpath: str | None = None) -> None:
        if every_n_train_steps < 1:
            raise InputError(f"--checkpoint.every_n_train_steps is {every_n_train_steps}; it must be at least 1")
        if keep < 2:
            raise InputError(
                f"--checkpoint.keep is {keep}; keep at least 2, for the newest may be damaged by what ended the run"
            )
        if dirpath and "://" in dirpath:
            raise InputError(f"--checkpoint.dirpath {dirpath} is not a folder; mount it, or copy from a local one")
        # Lightning knows a ModelCheckpoint by its class; what it does is all replaced below.
        super().__init__(dirpath, every_n_train_steps=every_n_train_steps, save_top_k=-1)
        self.keep = keep
        self.stop = StopSignal()

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.dirpath = trainer.strategy.broadcast(str(self._folder(trainer)))
        if stage != "fit":
            return
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = FileWriter()
        if trainer.is_global_zero:
            for leftover in Path(self.dirpath).glob(f"*{PARTIAL}"):
                _remove(leftover)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        validate_if_due_at_end(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop.install(trainer)
        self._last_global_step_saved = trainer.global_step  # where the run goes on from, if it does
        validate_if_due(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate() or trainer.fast_dev_run:
            return  # between two steps a checkpoint would lose the gradient gathered so far
        ends = trainer.should_stop or trainer.global_step == trainer.max_steps
        if ends or trainer.global_step % self._every_n_train_steps == 0:
            self.save(trainer)
        if number := self.stop.agreed():
            self.save(trainer)
            self._end(trainer, number)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Wait for a validation's end only where its step has no checkpoint; one that is broken off is made up for."""
        if trainer.global_step == self._last_global_step_saved and (number := self.stop.agreed()):
            self._end(trainer, number)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        note_validation(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass

    def _end(self, trainer: L.Trainer, number: int) -> NoReturn:
        rank_zero_info(f"Stopping after step {trainer.global_step}, for signal {number} was received")
        if trainer.is_global_zero:
            requeue(number)
        raise Preempted(number, trainer.global_rank)

    # -- how ----------------------------------------------------------------------------------------------------------

    def save(self, trainer: L.Trainer) -> None:
        """Write a checkpoint of the step just made, unless there is one; all ranks take part."""
        if self._last_global_step_saved == trainer.global_step:
            return
        _log_step(trainer)
        path = Path(self.dirpath or "", f"step_{trainer.global_step:08}.ckpt")
        partial = path.with_name(path.name + PARTIAL)
        if problem := self._write(trainer, partial):
            if trainer.is_global_zero and partial.exists():
                _remove(partial)  # there may be room without it
            rank_zero_warn(
                f"{path} could not be written: {problem}. The run goes on and tries again in "
                f"{self._every_n_train_steps} steps; the newest checkpoint is {self.last_model_path or 'none'}"
            )
            return
        checksums = self._checksums(trainer, partial) if partial.is_dir() else {}
        if trainer.is_global_zero:
            self._finish(partial, path, checksums)
        trainer.strategy.barrier("checkpoint")
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = self.best_model_path = self.last_model_path = str(path)

    def _write(self, trainer: L.Trainer, path: Path) -> str | None:
        """Write it, and tell every rank what kept any of them from it."""
        problem = None
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except (OSError, RuntimeError, CheckpointException) as error:  # shards; of a disk, every rank hears there
            causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
            problem = str(causes[0])
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where those that heard of nothing are waiting
        for owner in (trainer.strategy.checkpoint_io, trainer.strategy):
            problem = problem or getattr(owner, "problem", None)
        problems = [problem]
        if trainer.world_size > 1:
            problems = [None] * trainer.world_size
            distributed.all_gather_object(problems, problem, group=self.stop.group)
        return next(filter(None, problems), None)

    def _checksums(self, trainer: L.Trainer, folder: Path) -> dict[str, int]:
        """Each rank reads its share of the files."""
        names = contents(folder)
        own = {name: checksum(folder / name) for name in names[trainer.global_rank :: trainer.world_size]}
        shares = [own]
        if trainer.world_size > 1:
            shares = [{} for _ in range(trainer.world_size)]
            distributed.all_gather_object(shares, own, group=self.stop.group)
        return {name: crc for share in shares for name, crc in share.items()}

    def _finish(self, partial: Path, path: Path, checksums: dict[str, int]) -> None:
        """From here on it counts: name it, point to it, and remove what is too old."""
        if partial.is_dir():
            seal(partial, checksums)
        if path.is_dir():
            shutil.rmtree(path)  # cannot be replaced in one move, as a file can
        os.replace(partial, path)
        link = path.with_name(LINK)
        fresh = link.with_name(LINK + PARTIAL)
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(path.name)
        os.replace(fresh, link)
        sync(path.parent)
        for old in written(path.parent)[self.keep :]:
            _remove(old)

    # -- going on -----------------------------------------------------------------------------------------------------

    def _folder(self, trainer: L.Trainer) -> Path:
        return Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir, "checkpoints")).absolute()

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        """What Lightning takes for ``ckpt_path="last"``."""
        newest = newest_whole(self._folder(trainer))
        return {str(newest)} if newest else set()

    def state_dict(self) -> dict[str, Any]:
        return {}  # the folder says it all, also where it was moved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class FileWriter(TorchCheckpointIO):
    """Writes to the file directly. Lightning's gathers the whole file in memory and in the temporary folder first.

    What the disk says is kept in ``problem``, for here only one rank would know of it.
    """

    problem: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.problem = None
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            self.problem = str(error)
            path.unlink(missing_ok=True)


def _log_step(trainer: L.Trainer) -> None:
    """Log the step now, for a run that goes on from its checkpoint will not, and not again when the batch ends."""
    connector = trainer._logger_connector
    connector.update_train_step_metrics()
    name = "update_train_step_metrics"
    vars(connector)[name] = partial(vars(connector).pop, name)  # in place of the next call, and gone with it


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
