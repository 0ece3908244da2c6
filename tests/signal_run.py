"""Send signals at random moments for any length of time: ``python -m tests.signal_run --seconds 600 --seed 1``.

Each trial starts a real run, which resumes from its last checkpoint, and sends a signal of one of five kinds to one of
its processes or to all. The moment is random within one phase: start-up from the first millisecond on, restoring (in a
new run the sanity validation), training, saving, validation, the end. All set-ups, phases and signals are equally
frequent. After a minute no process may be left, and each exit status must be one that recipes/cluster lists for this
case. A run that is complete must equal an uninterrupted one bit for bit: weights, optimizer, schedule, data.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cola_lightning.checkpoints import find_corruption
from cola_lightning.checkpoints.latest import LINK
from tests.processes import Run, preload
from tests.signal_outcomes import Trial, documented_statuses, faults, judge, table
from tests.signal_phases import PHASES, differences, everything, fit, members, phases

KINDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL)
LENGTH, SAVE_EVERY, VALIDATE_EVERY = 36, 12, 18
SECONDS_LEFT = 60.0
"""Seconds after a signal within which all processes must have ended."""
SECONDS_OF_LAUNCHER = {"start": 2.0, "restore": 2.0}
"""Seconds from the failure of one process until the others are ended, as a launcher does: few while they cannot notice
it, else ``SECONDS_TO_HEAR``, because they should end by themselves."""
SECONDS_TO_HEAR = 15.0

SETUPS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "one process, one worker": (1, ["--data.num_workers=1"]),
    "ddp": (2, ["--trainer.strategy=ddp"]),
    "fsdp2": (2, ["--trainer.strategy=fsdp2"]),
    "fsdp2 in shards": (
        2,
        [
            "--trainer.strategy=cola_lightning.distributed.strategies.FSDP2Strategy",
            "--trainer.strategy.save_distributed_checkpoint=true",
        ],
    ),
    "zero 2": (2, ["--trainer.strategy=tests.signal_phases.ZeRO2", "--trainer.strategy.stage=2"]),
}
"""Number of processes and flags of each."""


class Attack:
    """Send signals to runs in a folder.

    Args:
        flags: Of a run of few steps, without its directory, devices and length.
        folder: For all that the runs write.
        seed: Decides signals, targets and moments, but not the machine's speed.
        log: File that gets a line of JSON for each trial.
    """

    def __init__(self, flags: list[str], folder: Path, seed: int, log: Path | None = None) -> None:
        self.flags, self.folder, self.draw, self.log = flags, folder, random.Random(seed), log
        self.seed = seed
        self.documented = documented_statuses()
        self.usual: dict[str, dict[str, float]] = {}
        """Seconds of each phase of an uninterrupted run, the longest."""
        self.names = {setup: (f"run{number}" for number in itertools.count()) for setup in SETUPS}
        self.current: dict[str, str] = {}
        self.compared: Counter[str] = Counter()

    def run(self, seconds: float, setups: list[str], signals: int = 10**9) -> list[Trial]:
        """Send this many signals, for at most this many seconds. Then finish the runs that were begun."""
        deadline = time.monotonic() + seconds
        trials: list[Trial] = []
        for setup, phase, number in itertools.islice(self._plan(setups), 10 * min(signals, 10**6)):
            if time.monotonic() > deadline or len(trials) == signals:
                break
            if setup not in self.usual:
                self._unbroken(setup)
            if trial := self.trial(setup, phase, number):
                trials.append(trial)
                if trial.complete:
                    trial.faults += self._compare(setup)
                if trial.complete or trial.faults:
                    self._forget(setup, keep=bool(trial.faults))
                if self.log:
                    with self.log.open("a") as log:
                        log.write(json.dumps(asdict(trial)) + "\n")
        for setup in list(self.current):
            self._start(setup, self.current[setup]).done()
            trials[-1].faults += self._compare(setup)
        return trials

    def _plan(self, setups: list[str]) -> Iterator[tuple[str, str, signal.Signals]]:
        """Yield every signal in every phase of every set-up, again and again in another order."""
        while True:
            rounds = {setup: list(itertools.product(PHASES, KINDS)) for setup in setups}
            for each in rounds.values():
                self.draw.shuffle(each)
            for row in zip(*rounds.values(), strict=True):
                yield from ((setup, *cell) for setup, cell in zip(setups, row, strict=True))

    def _start(self, setup: str, name: str) -> Run:
        ranks, more = SETUPS[setup]
        folder = self.folder / setup.replace(" ", "_") / name
        flags = [
            "fit", *self.flags, f"--run_dir={folder}", "--ckpt_path=last", f"--trainer.devices={ranks}",
            f"--trainer.max_steps={LENGTH}", f"--checkpoint.every_n_train_steps={SAVE_EVERY}",
            f"--trainer.val_check_interval={VALIDATE_EVERY}", "--trainer.num_sanity_val_steps=1", *more,
        ]  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("phases*"):
            old.unlink()
        return Run(fit, flags, folder, ranks=ranks, folder=folder)

    def _last(self, setup: str, name: str) -> Path:
        return self.folder / setup.replace(" ", "_") / name / "checkpoints" / LINK

    def _unbroken(self, setup: str) -> None:
        self._start(setup, "unbroken").done()
        noted = phases(self._last(setup, "unbroken").parent.parent / "phases0")
        noted.append((time.monotonic(), ""))
        usual = dict.fromkeys(PHASES, 0.05)
        for (begin, phase), (end, _) in itertools.pairwise(noted):
            usual[phase] = max(usual[phase], end - begin)
        self.usual[setup] = usual

    def trial(self, setup: str, phase: str, number: signal.Signals) -> Trial | None:
        """Start the run and send it one signal. Return None if the run ended before."""
        ranks = SETUPS[setup][0]
        if setup not in self.current:
            self.current[setup] = next(self.names[setup])
        name = self.current[setup]
        targets = list(self.draw.choice([range(ranks), *([rank] for rank in range(ranks))]))
        delay, visit = self.draw.random() * self.usual[setup][phase], self.draw.randint(1, 2)
        if phase == "restore" and not self._last(setup, name).exists():
            phase = "validation"  # of a new run, before it trains
            visit = 1
        run = self._start(setup, name)
        began = time.monotonic()
        trace = self._last(setup, name).parent.parent / f"phases{targets[0]}"
        if phase != "start":
            while sum(each == phase for _, each in phases(trace)) < visit and all(p.is_alive() for p in run.processes):
                if visit == 2 and phases(trace)[-1:] and phases(trace)[-1][1] == "end":
                    break  # there is no second visit
                time.sleep(0.002)
        time.sleep(delay)
        sent = time.monotonic()
        alive = [rank for rank in targets if run.processes[rank].is_alive()]
        for rank in alive:
            os.kill(run.processes[rank].pid, number)
        noted = [(moment, each) for moment, each in phases(trace) if moment <= sent] or [(began, "start")]
        phase = noted[-1][1]
        if phase == "validation" and not any(each == "train" for _, each in noted):
            phase = "sanity"
        launched = self._wait(run, sent, SECONDS_OF_LAUNCHER.get(phase, SECONDS_TO_HEAR))
        seconds = time.monotonic() - sent
        left = members([process.pid for process in run.processes])
        complete = self._last(setup, name).resolve().name == f"step_{LENGTH:08}.ckpt"
        raw = [process.exitcode for process in run.processes]
        statuses = [-1 if code is None else code if code >= 0 else 128 - code for code in raw]
        trial = Trial(
            setup, number.name, alive, phase, round(sent - noted[-1][0], 4), statuses, round(seconds, 1), launched,
            complete,
        )  # fmt: skip
        if left:
            trial.faults.append(f"still there after {seconds:.0f} s: {left}")
        run.kill(signal.SIGKILL)
        for pid in left:
            if pid in members([process.pid for process in run.processes]):
                os.kill(pid, signal.SIGKILL)
        trial.faults += judge(trial, self.documented)
        if trial.faults:
            trial.faults.append(run.output())
        return trial if alive or trial.faults else None

    def _wait(self, run: Run, sent: float, patience: float) -> bool:
        """Wait until no process is left, at most a minute. If one has failed, end the others, as a launcher does.

        Returns:
            Whether processes were ended.
        """
        failed, launched = None, False
        sessions = [process.pid for process in run.processes]
        while time.monotonic() < sent + SECONDS_LEFT:
            alive = [process for process in run.processes if process.is_alive()]
            if not alive and not members(sessions):
                break
            if failed is None and any(process.exitcode for process in run.processes):
                failed = time.monotonic()
            if alive and failed is not None and not launched and time.monotonic() > failed + patience:
                run.kill(signal.SIGTERM)
                launched = True
            time.sleep(0.05)
        return launched

    def _compare(self, setup: str) -> list[str]:
        """List what differs from the uninterrupted run."""
        one, other = (self._last(setup, name) for name in ("unbroken", self.current[setup]))
        if problem := find_corruption(other):
            return [f"{other} is damaged: {problem}"]
        self.compared[setup] += 1
        return [f"{part} differs: {difference}" for part, difference in differences(everything(one), everything(other))]

    def _forget(self, setup: str, keep: bool) -> None:
        folder = self._last(setup, self.current.pop(setup)).parent.parent
        if not keep:
            shutil.rmtree(folder)


def flags(folder: Path) -> list[str]:
    """Write texts to a folder, and return the flags of a run on them."""
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
    parser.add_argument("--signals", type=int, default=10**9, help="End after so many, if that is sooner.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--setups", nargs="*", default=list(SETUPS), choices=list(SETUPS))
    parser.add_argument("--log", type=Path, help="File that gets a line of JSON for each trial.")
    parser.add_argument("--summary", action="store_true", help="Do no more than count what --log holds.")
    options = parser.parse_args()
    if options.summary:
        print(table([Trial(**json.loads(line)) for line in options.log.read_text().splitlines()]))
        raise SystemExit
    preload("deepspeed", "tests.signal_phases")  # else each rank takes seconds for them
    with tempfile.TemporaryDirectory() as place:
        attack = Attack(flags(Path(place)), Path(place), options.seed, options.log)
        trials = attack.run(options.seconds, options.setups, options.signals)
    print(table(trials))
    print(f"complete and compared: {dict(attack.compared)}")
    wrong = faults(trials, options.seed)
    print(wrong or "nothing was wrong")
    raise SystemExit(bool(wrong))
