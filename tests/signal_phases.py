"""Run the processes of ``tests.signal_run``, and compare checkpoints bit for bit.

Each process writes down the phase of its run, so that a signal can be sent in any phase.
"""

import os
import signal
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from cola_lightning import signals
from cola_lightning.callbacks import Checkpoints
from cola_lightning.checkpoints import read
from cola_lightning.cli.app import main
from tests.distributed.parity_run import DeepSpeedOnCPU

PHASES = ("start", "restore", "train", "save", "validation", "end")


class ZeRO2(DeepSpeedOnCPU):
    """ZeRO-2 on the CPU. Lightning allows it on GPUs only."""

    def __init__(self, stage: int = 2) -> None:
        super().__init__(stage=stage, process_group_backend="gloo", logging_batch_size_per_gpu=2, pin_memory=False)


def fit(flags: list[str], folder: Path | None = None) -> None:
    """Do what ``python -m cola_lightning`` does, without the seconds of its imports; write its phases to a folder.

    The process begins a session, so that whatever it starts can be found.
    """
    for number in signals.STOP:  # a shell starts a background job with SIGINT ignored
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signals.LISTENER.listen()
    os.setsid()
    if folder is not None:
        _trace_phases(folder)
    main(flags)


def _trace_phases(folder: Path) -> None:
    trace = Trace(folder / f"phases{os.environ.get('RANK', '0')}")
    trace.note("start")
    trace.around(_CheckpointConnector, "resume_start", "restore")
    trace.around(_CheckpointConnector, "resume_end", after="start")
    trace.around(_EvaluationLoop, "run", "validation", after=None)
    trace.around(Checkpoints, "on_train_start", after="train")
    trace.around(Checkpoints, "_try_save", "save", after=None)
    trace.around(Checkpoints, "on_train_end", "end")


class Trace:
    """File with a line for each change of phase: the monotonic clock and the phase's name."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.phase = ""

    def note(self, phase: str) -> None:
        self.phase = phase
        os.write(self.file, f"{time.monotonic()} {phase}\n".encode())

    def around(self, owner: type, name: str, before: str = "", after: str | None = "") -> None:
        """Note a phase before a method and one after it; "" notes none, and None the phase from before the method."""
        inner: Callable = getattr(owner, name)

        @wraps(inner)
        def noted(*args: Any, **kwargs: Any) -> Any:
            earlier = self.phase
            if before:
                self.note(before)
            result = inner(*args, **kwargs)
            if after is None or after:
                self.note(earlier if after is None else after)
            return result

        setattr(owner, name, noted)


def phases(path: Path) -> list[tuple[float, str]]:
    """Read the phases that a process has written down so far."""
    if not path.exists():
        return []
    lines = [line.split() for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [(float(moment), phase) for moment, phase in lines]


def members(sessions: list[int]) -> dict[int, str]:
    """Return the names of the processes, by number, that belong to these sessions and have not ended."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                name, _, rest = (folder / "stat").read_text().rpartition(")")
            except OSError:
                continue  # it has ended meanwhile
            state, _, _, session = rest.split()[:4]
            if int(session) in sessions and state not in "ZX":
                found[int(folder.name)] = name.partition("(")[2]
    return found


def everything(path: Path) -> dict[str, Any]:
    """Read everything in a checkpoint that decides how the run continues."""
    if path.is_file():
        return torch.load(path, weights_only=True)
    if (path / ".metadata").is_file():
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
        from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

        parts: dict[str, Any] = {}
        _load_state_dict(parts, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        return {"parts": parts, "rest": torch.load(path / "meta.pt", weights_only=True)}
    checkpoint = read(path)
    return {"weights": checkpoint.weights, "state": checkpoint.state}


def differences(one: Any, other: Any, where: str = "") -> list[tuple[str, str]]:
    """List the values that differ in any bit, each with its place."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and torch.equal(one, other)
        return [] if same else [(where, "tensors")]
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            return [(where, f"{one!r:.300} and {other!r:.300}")]
        return [found for key in one for found in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple):
        if not isinstance(other, list | tuple) or len(one) != len(other):
            return [(where, f"{one!r:.300} and {other!r:.300}")]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, (a, b) in pairs for found in differences(a, b, f"{where}/{index}")]
    return [] if one == other or one != one else [(where, f"{one!r:.300} and {other!r:.300}")]
