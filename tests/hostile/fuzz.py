"""Run the command line on randomly altered inputs, and report each run without a result or a one-line error.

    python -m tests.hostile.fuzz --runs 1000 --seed 0

Each case is drawn from the seed and its number, so ``--only 17`` repeats case 17, and shows its output. A case runs in
a fork of this process, which has imported everything, with limits on time and memory.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

from cola_lightning.cli.app import main
from tests.hostile.fuzz_cases import CASES, Case, Prepared, prepare

SECONDS, WAITED, MEMORY = 60, 300, 6 * 2**30
"""Limits of a case: CPU seconds, which do not depend on other load of the machine; seconds of wall-clock time, for
a case that waits for ever; and bytes of memory."""


# -- running ----------------------------------------------------------------------------------------------------------


def child(case: Case, draw: random.Random, prepared: Prepared, place: Path) -> None:
    """Make a case, run it, and end this process."""
    os.setsid()
    log = os.open(place / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    # pytest replaces these streams, so open those of the process.
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    os.chdir(place)
    Path("evil_module.py").write_text("open('TRACE', 'w')\nclass Evil: pass\n")
    sys.path.insert(0, str(place))
    status = 70
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
        command = case(draw, prepared)
        print("COMMAND", command, flush=True)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        main(command)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def judge(place: Path, status: int | None) -> str:
    """Return ``right``, ``line`` (a one-line error), or the kind of failure."""
    shown = (place / "log").read_text(errors="replace")
    command, _, after = shown.partition("COMMAND ")[2].partition("\n")
    if (place / "TRACE").exists():
        return "CODE RUN"
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "HANG"
    if os.WIFSIGNALED(status):
        return f"SIGNAL {os.WTERMSIG(status)}"
    if not command:
        return "HARNESS"
    if "Traceback (most recent call last)" in after:
        return "TRACEBACK " + next(
            (line for line in reversed(after.splitlines()) if line and not line.startswith(" ")), ""
        )[:150]  # fmt: skip
    code = os.WEXITSTATUS(status)
    if code and not any("error: " in line for line in after.splitlines()):
        return f"NO LINE (exit {code})"
    return "line" if code else "right"


def run(case: Case, draw: random.Random, prepared: Prepared) -> tuple[str, str]:
    """Run a case in a fork, and return its outcome and its output."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        place = Path(folder, "of", "a", "case")  # deep, because commands look for a run in the parents
        place.mkdir(parents=True)
        (place / "log").touch()
        pid = os.fork()
        if pid == 0:
            child(case, draw, prepared, place)
        ends, status = time.monotonic() + WAITED, None
        while time.monotonic() < ends:
            done, ended = os.waitpid(pid, os.WNOHANG)
            if done:
                status = ended
                break
            time.sleep(0.02)
        else:
            with suppress(ProcessLookupError):  # the child may not have its own process group yet
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return judge(place, status), (place / "log").read_text(errors="replace")


def fuzz(
    numbers: range | list[int], seed: int, prepared: Prepared, seconds: float = 1e9
) -> dict[int, tuple[str, str, str]]:
    """Run cases until the time is over. Return by number: the kind of case, its outcome and its output."""
    ends, found = time.monotonic() + seconds, {}
    for number in numbers:
        if time.monotonic() > ends:
            break
        case, draw = CASES[number % len(CASES)], random.Random(f"{seed}-{number}")
        found[number] = (case.__name__, *run(case, draw, prepared))
    return found


def cli() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--begin", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="seconds after which no further case begins")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases to run, with their output")
    parser.add_argument("--keep", help="folder for the inputs of all cases; it is made if it does not exist")
    options = parser.parse_args()
    folder = Path(options.keep or tempfile.mkdtemp(prefix="fuzz-base-"))
    folder.mkdir(exist_ok=True)
    ready = folder / "prepared.json"
    if ready.exists():
        facts = json.loads(ready.read_text())
        prepared = Prepared(folder, facts["flags"], facts["config"])
    else:
        prepared = prepare(folder)
        ready.write_text(json.dumps({"flags": prepared.flags, "config": prepared.config}))
    numbers = options.only or range(options.begin, options.begin + options.runs)
    found = fuzz(numbers, options.seed, prepared, options.seconds)
    for number, (kind, what, shown) in found.items():
        if options.only:
            print(shown)
        if what not in ("right", "line"):
            print(f"{number} {kind}: {what}")
    print(
        f"{len(found)} runs, seed {options.seed}:", dict(Counter(what.split(" ")[0] for _, what, _ in found.values()))
    )
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    cli()
