"""Signals at random moments, as long as one likes: ``python -m tests.signal_run --seconds 600 --seed 1``.

Each trial starts a real run, which goes on from its last checkpoint, and sends a signal of one of five kinds to one of
its processes or to all, at a random moment from the first millisecond on. However that ends, no process may be left
after a minute, each exit status must be one that recipes/cluster lists, and a run that is complete at last must have
what an unbroken one has, bit for bit: weights, optimizer, schedule, data.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cola_lightning import signals
from cola_lightning.checkpoints import damage, read
from cola_lightning.checkpoints.newest import LINK
from cola_lightning.cli import main
from tests.parity_run import DeepSpeedOnCPU
from tests.processes import Run

KINDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL)
LENGTH = 60


class ZeRO2(DeepSpeedOnCPU):
    """ZeRO-2, which Lightning admits on GPUs only."""

    def __init__(self, stage: int = 2) -> None:
        super().__init__(stage=stage, process_group_backend="gloo", logging_batch_size_per_gpu=2, pin_memory=False)


SETUPS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "one process, one worker": (1, ["--data.num_workers=1"]),
    "ddp": (2, ["--trainer.strategy=ddp"]),
    "fsdp2": (2, ["--trainer.strategy=fsdp2"]),
    "fsdp2 in shards": (
        2,
        [
            "--trainer.strategy=cola_lightning.strategies.FSDP2Strategy",
            "--trainer.strategy.save_distributed_checkpoint=true",
        ],
    ),
    "zero 2": (2, ["--trainer.strategy=tests.signal_run.ZeRO2", "--trainer.strategy.stage=2"]),
}
"""Number of processes and flags of each."""


def fit(flags: list[str]) -> None:
    """What ``python -m cola_lightning`` does, without the seconds of its imports."""
    signals.LISTENER.listen()
    main(flags)


@dataclass
class Report:
    """What happened: trials by set-up, signal and exit statuses; runs that were compared; what was wrong."""

    trials: Counter = field(default_factory=Counter)
    complete: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Attack:
    """Sends signals to runs in a folder.

    Args:
        flags: Of a run of few steps, without its directory, devices and length.
        folder: For all that the runs write.
        seed: Decides signals, targets and moments, but not the machine's speed.
    """

    def __init__(self, flags: list[str], folder: Path, seed: int) -> None:
        self.flags, self.folder, self.draw, self.report = flags, folder, random.Random(seed), Report()
        self.durations: dict[str, float] = {}

    def start(self, setup: str, name: str) -> Run:
        ranks, more = SETUPS[setup]
        folder = self.folder / setup.replace(" ", "_") / name
        flags = [
            "fit", *self.flags, f"--run_dir={folder}", "--ckpt_path=last", f"--trainer.devices={ranks}",
            f"--trainer.max_steps={LENGTH}", "--checkpoint.every_n_train_steps=20", "--trainer.val_check_interval=30",
            "--trainer.num_sanity_val_steps=1", *more,
        ]  # fmt: skip
        return Run(fit, flags, ranks=ranks, folder=folder)

    def last(self, setup: str, name: str) -> Path:
        return self.folder / setup.replace(" ", "_") / name / "checkpoints" / LINK

    def run(self, seconds: float, setups: list[str]) -> Report:
        """Attack the set-ups in turn for so long, and finish what was begun."""
        for setup in setups:
            began = time.monotonic()
            self.start(setup, "unbroken").done()
            self.durations[setup] = time.monotonic() - began
        deadline = time.monotonic() + seconds
        number, begun = 0, set()
        while time.monotonic() < deadline and not self.report.faults:
            setup = setups[number % len(setups)]
            name = f"run{sum(done == setup for done in self.report.complete)}"
            begun.add((setup, name))
            if self.trial(setup, name):
                self.compare(setup, name)
            number += 1
        for setup, name in sorted(begun):
            if not self.report.faults and not self.complete(setup, name):
                self.start(setup, name).done()
                self.compare(setup, name)
        return self.report

    def trial(self, setup: str, name: str) -> bool:
        """Start the run and send it one signal; whether it is complete then."""
        number, ranks = self.draw.choice(KINDS), SETUPS[setup][0]
        targets = self.draw.choice([range(ranks), *([rank] for rank in range(ranks))])
        moment = self.draw.random() ** 1.5 * 1.1 * self.durations[setup]
        run = self.start(setup, name)
        time.sleep(moment)
        for rank in targets:
            process = run.processes[rank]
            if process.is_alive():
                os.kill(process.pid, number)
        what = f"{setup}, {number.name} to {list(targets)} after {moment:.2f} s"
        statuses = self.wait(run)
        self.report.trials[setup, number.name, tuple(statuses)] += 1
        if None in statuses:
            self.report.faults.append(f"{what}: still running after a minute\n{run.output()}")
            return False
        allowed = {0, 128 + number, -number}
        if ranks > 1:
            allowed |= {1, -signal.SIGTERM, 128 + signal.SIGTERM}  # another is gone, or the launcher ended this one
            allowed |= {-signal.SIGABRT} if number == signal.SIGKILL else set()
        before_main = moment < 0.5 and number == signal.SIGINT  # Python's own way
        if not set(statuses) <= allowed and not before_main:
            self.report.faults.append(f"{what}: ended with {statuses}\n{run.output()}")
        if statuses[0] == 0 and not self.complete(setup, name):
            self.report.faults.append(f"{what}: exit status 0 without the last step\n{run.output()}")
        return self.complete(setup, name)

    def wait(self, run: Run) -> list[int | None]:
        """Exit statuses; None after a minute. As a launcher does, end the others where one has failed."""
        deadline, failed = time.monotonic() + 60, None
        while time.monotonic() < deadline and any(process.is_alive() for process in run.processes):
            if failed is None and any(process.exitcode for process in run.processes):
                failed = time.monotonic()
            if failed is not None and time.monotonic() > failed + 15:
                run.kill(signal.SIGTERM)
                failed = float("inf")
            time.sleep(0.02)
        statuses = [process.exitcode for process in run.processes]
        run.kill(signal.SIGKILL)
        return statuses

    def complete(self, setup: str, name: str) -> bool:
        last = self.last(setup, name)
        return last.exists() and last.resolve().name == f"step_{LENGTH:08}.ckpt"

    def compare(self, setup: str, name: str) -> None:
        """Note what differs from the unbroken run, and begin another."""
        one, other = (self.last(setup, each) for each in ("unbroken", name))
        if problem := damage(other):
            self.report.faults.append(f"{setup}: {other} is damaged: {problem}")
        for part, difference in differences(everything(one), everything(other)):
            self.report.faults.append(f"{setup}: {part} differs: {difference}")
        self.report.complete.append(setup)


def everything(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds and that decides how the run goes on."""
    if path.is_file():
        state = torch.load(path, weights_only=True)
    elif (path / ".metadata").is_file():
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
        from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

        parts: dict[str, Any] = {}
        _load_state_dict(parts, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        state = {"parts": parts, "rest": torch.load(path / "meta.pt", weights_only=True)}
    else:
        checkpoint = read(path)
        state = {"weights": checkpoint.weights, "state": checkpoint.state}
    return state


def differences(one: Any, other: Any, where: str = "") -> list[tuple[str, str]]:
    """What is not the same, bit for bit."""
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


def flags(folder: Path) -> list[str]:
    """Of a run on a few words, from texts that are written to a folder."""
    draw = random.Random(0)
    words = ("the", "of", "and", "nation", "people", "war", "peace", "year", "upon", "great", "law", "land", "sum")
    for index in range(40):
        text = " ".join(draw.choices(words, k=draw.randint(30, 120)))
        (folder / f"{index:02}.txt").write_text(text, encoding="utf-8")
    settings = {
        "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false", "trainer.log_every_n_steps": 1,
        "model.vocab_size": 300, "model.hidden_size": 32, "model.intermediate_size": 48, "model.num_hidden_layers": 2,
        "model.num_attention_heads": 4, "model.projection": "CoLA", "model.projection.rank": 8,
        "model.schedule.warmup_steps": 2, "data": "TextDataModule", "data.paths": f"[{folder}/*.txt]",
        "data.vocab_size": 300, "data.sequence_length": 32, "data.batch_size": 2,
        "data.cache_dir": str(folder / "cache"),
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in settings.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--setups", nargs="*", default=list(SETUPS), choices=list(SETUPS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        report = Attack(flags(Path(place)), Path(place), options.seed).run(options.seconds, options.setups)
    for (setup, name, statuses), times in sorted(report.trials.items()):
        print(f"{setup:24} {name:8} {statuses!s:14} {times}")
    print(f"{sum(report.trials.values())} signals; complete and compared: {dict(Counter(report.complete))}")
    print("\n\n".join(report.faults) or "nothing was wrong")
    raise SystemExit(bool(report.faults))
