"""Write the checkpoints of a run so that each appears only when it is complete."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import distributed

from cola_lightning.checkpoints.latest import PARTIAL
from cola_lightning.checkpoints.manifest import checksum, contents, sync, write_manifest


class CheckpointWriter:
    """The writer that replaces ``trainer.save_checkpoint``.

    It writes a checkpoint under another name beside its place, adds the manifest to a folder, and renames it when every
    byte is on the disk. If a rank cannot write its part, all ranks learn of it, and none waits for that rank.

    :func:`cola_lightning.output_files.write_whole` does the same for a small text file. Here torch and the strategies
    write, all ranks take part, and folders are renamed.

    Args:
        trainer: Trainer of this run. Its ``save_checkpoint`` is replaced.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer
        self.group: distributed.ProcessGroup | None = None
        """Process group for exchanges on the CPU; None to use the run's own."""
        self._save = trainer.save_checkpoint
        trainer.save_checkpoint = self._save_or_warn  # type: ignore[method-assign]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = FileWriter()

    def _save_or_warn(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        if "://" in str(filepath):  # remote storage cannot rename
            self._save(filepath, weights_only, storage_options)
        elif problem := self.try_save(Path(filepath), weights_only):
            rank_zero_warn(f"{filepath} could not be written: {problem}. The run goes on without it")

    def try_save(self, path: Path, weights_only: bool | None = False) -> str | None:
        """Write a checkpoint. All ranks must call this.

        Returns:
            The problem of a rank that could not write, the same on all ranks; None if the checkpoint is on the disk.
        """
        # 1. All ranks write under another name. Whether a rank could not must be agreed before the next collective.
        partial = path.with_name(path.name + PARTIAL)
        problem = self._agree(self._write(partial, weights_only))
        if problem is None:
            # 2. Read back what is on the disk, for the manifest. 3. Rank 0 adds it, and renames the checkpoint.
            checksums, problem = self._checksums(partial)
            if problem is None and self.trainer.is_global_zero:
                try:
                    move_into_place(partial, path, checksums)
                except OSError as error:
                    problem = str(error)
            problem = self._agree(problem)
        if problem and self.trainer.is_global_zero:
            with suppress(OSError):
                remove(partial)  # this may free the space that was missing
        return problem

    def _write(self, path: Path, weights_only: bool | None) -> str | None:
        """Write this rank's part of a checkpoint, and return its problem, if any."""
        from torch.distributed.checkpoint import CheckpointException  # slow to import

        strategy, problem = self.trainer.strategy, None
        try:
            self._save(path, weights_only)
        except (OSError, RuntimeError, CheckpointException) as error:
            # In sharded checkpoints each rank gets the errors of all ranks. Other formats keep theirs in ``problem``.
            causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
            problem = str(causes[0])
            strategy.barrier("Trainer.save_checkpoint")  # the ranks without an error wait there
        # Who writes a part of its own (FileWriter, a strategy) keeps its error there instead of raising it on one rank
        # only.
        for owner in (strategy.checkpoint_io, strategy):
            problem = problem or getattr(owner, "problem", None)
        return problem

    def _gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks."""
        values = [value] * self.trainer.world_size
        if self.trainer.world_size > 1:
            distributed.all_gather_object(values, value, group=self.group)
        return values

    def _agree(self, problem: str | None) -> str | None:
        """Exchange the problems of all ranks, and return the first."""
        return next(filter(None, self._gather(problem)), None)

    def _checksums(self, folder: Path) -> tuple[dict[str, int], str | None]:
        """Compute the checksums of a folder's files, each rank for its share of them, and exchange them.

        A checkpoint of one file has its checksums inside, so the result is empty.
        """
        own: dict[str, int] = {}
        trainer, problem = self.trainer, None
        try:
            if folder.is_dir():
                # Of 5 files and 2 ranks, rank 0 reads files 0, 2 and 4, and rank 1 reads 1 and 3.
                names = contents(folder)[trainer.global_rank :: trainer.world_size]
                own = {name: checksum(folder / name) for name in names}
        except OSError as error:
            problem = str(error)
        checksums = {name: crc for share in self._gather(own) for name, crc in share.items()}
        return checksums, self._agree(problem)


class FileWriter(TorchCheckpointIO):
    """A checkpoint plugin that writes to the file directly.

    Lightning's own first collects the whole file in memory and in the temporary folder.
    """

    problem: str | None = None
    """Error of the last write. It is kept and not raised, because it would be raised on one rank only."""

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
            with suppress(OSError):
                path.unlink(missing_ok=True)


def move_into_place(partial: Path, path: Path, checksums: dict[str, int]) -> None:
    """Add the manifest to a folder, and rename a written checkpoint to its final name."""
    if partial.is_dir():
        write_manifest(partial, checksums)
    # Example for a folder step_00000020.ckpt that is there already: it becomes step_00000020.ckpt.replaced.partial, the
    # new one takes its name, and then the old one is removed.
    replaced = path.with_name(f"{path.name}.replaced{PARTIAL}")
    if path.is_dir():  # unlike a file, a folder cannot be replaced by one rename
        if replaced.exists():
            remove(replaced)
        os.replace(path, replaced)
    os.replace(partial, path)
    sync(path.parent)
    if replaced.exists():
        with suppress(OSError):  # the next start of the run removes it then
            remove(replaced)


def remove(path: Path) -> None:
    """Remove a checkpoint, a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size(path: Path) -> int:
    """Count the bytes of a checkpoint, a file or a folder."""
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
