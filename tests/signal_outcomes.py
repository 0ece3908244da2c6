"""The outcome of each signal that ``tests.signal_run`` sends: what is a fault, and tables of all."""

import itertools
import re
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.signal_phases import PHASES


@dataclass
class Trial:
    """A signal and its outcome."""

    setup: str
    signal: str
    targets: list[int]
    phase: str
    """Phase of the first target when the signal was sent."""
    delay: float
    """Seconds since that phase began."""
    statuses: list[int]
    """Exit statuses as a shell reports them."""
    seconds: float
    """Seconds from the signal to the end of the last process."""
    launcher: bool
    """Whether the others had to be ended, as a launcher does."""
    complete: bool
    faults: list[str] = field(default_factory=list)


def documented_statuses() -> set[int]:
    """Read the exit statuses in the table of recipes/cluster."""
    text = (Path(__file__).parent.parent / "recipes" / "cluster" / "README.md").read_text(encoding="utf-8")
    _, _, table = text.partition("| exit status |")
    rows = itertools.takewhile(lambda line: line.startswith("|"), table.splitlines()[1:])
    return {int(number) for row in rows for number in re.findall(r"\b\d+\b", row.split("|")[1]) if number != "128"}


def judge(trial: Trial, documented: Iterable[int]) -> list[str]:
    """List the exit statuses that contradict recipes/cluster."""
    number = 128 + signal.Signals[trial.signal]
    gone = any(trial.statuses) and len(trial.statuses) > 1  # so that another may fail, or be ended by its launcher
    faults = []
    for rank, status in enumerate(trial.statuses):
        what = f"rank {rank} ended with {status}"
        if status not in documented:
            faults.append(f"{what}, which is not documented")
        elif status == 0 and not trial.complete and (rank == 0 or trial.statuses[0] != number):
            faults.append(f"{what} without the last step")
        elif status not in (0, number, *((1, 128 + signal.SIGTERM) if gone else ())):
            faults.append(f"{what}, which is for another end")
        elif status == 1 and set(trial.statuses) == {1}:
            faults.append(f"{what}, though no process was gone")
        elif status == 128 + signal.SIGTERM != number and not trial.launcher:
            faults.append(f"{what}, though nobody sent that")
    return faults


def faults(trials: list[Trial], seed: int) -> str:
    """Describe every fault in full, with the trial and the seed that led to it; empty if there is none."""
    described = []
    for number, trial in enumerate(trials):
        settings = ", ".join(f"{name}={value!r}" for name, value in asdict(trial).items() if name != "faults")
        described += [f"trial {number} of --seed {seed} ({settings}):\n{fault}" for fault in trial.faults]
    return "\n\n".join(described)


def table(trials: list[Trial]) -> str:
    """Count signals by set-up and phase, and by signal and exit statuses."""
    columns = [*PHASES[:2], "sanity", *PHASES[2:]]
    cells = Counter((trial.setup, trial.phase) for trial in trials)
    lines = [f"{'':24}" + "".join(f"{phase:>11}" for phase in columns) + f"{'all':>8}{'complete':>10}"]
    for setup in dict.fromkeys(trial.setup for trial in trials):
        own = [trial for trial in trials if trial.setup == setup]
        row = "".join(f"{cells[setup, phase]:11}" for phase in columns)
        lines.append(f"{setup:24}{row}{len(own):8}{sum(trial.complete for trial in own):10}")
    ends = Counter((trial.signal, tuple(trial.statuses)) for trial in trials)
    lines += [f"{name:8} {statuses!s:14} {times}" for (name, statuses), times in sorted(ends.items())]
    slowest = max((trial.seconds for trial in trials), default=0)
    lines.append(f"{len(trials)} signals; the last process ended at most {slowest} s after its signal")
    return "\n".join(lines)
