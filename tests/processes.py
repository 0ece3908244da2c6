"""Start the ranks of a run as real processes. A server imports everything once, and forks a process for each rank.

What needs a fresh interpreter (a command line, an import) uses subprocess.
"""

import atexit
import multiprocessing
import multiprocessing.util
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_PRELOADED = ["tests.distributed.parity_run", "cola_lightning.cli.lightning_cli"]
_SERVER.set_forkserver_preload(_PRELOADED)
_RUNS: list["Run"] = []


def preload(*modules: str) -> None:
    """Let the server import these modules, too. Call it before the first run."""
    _SERVER.set_forkserver_preload([*_PRELOADED, *modules])


allowed = True
"""Whether the present test may start ranks, because it is marked ``distributed`` or ``slow``."""


def end_all() -> list[str]:
    """End the ranks that a failed test has left, and name them."""
    left = []
    while _RUNS:
        run = _RUNS.pop()
        left += [f"rank {rank}" for rank, process in enumerate(run.processes) if process.is_alive()]
        run.kill(signal.SIGKILL)
    return left


# Registered after multiprocessing.util and therefore called before it, which would wait for these children.
atexit.register(end_all)


def child_processes() -> set[int]:
    """List the children of this process without multiprocessing's servers; empty without /proc."""
    servers = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    children: set[int] = set()
    for tasks in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            children |= {int(child) for child in tasks.read_text().split()}
    return children - servers


class Run:
    """Run ``target(*arguments)`` on several ranks, each a process with the environment that torchrun gives."""

    def __init__(self, target: Callable, *arguments: Any, ranks: int, folder: Path, **environment: str) -> None:
        assert allowed, "a test that starts ranks is marked: @pytest.mark.distributed"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("PYTHONPATH", str(Path(__file__).parent.parent))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            told = {
                "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": 1,
            }  # fmt: skip
            told = {name: str(value) for name, value in told.items()} if ranks > 1 else {"OMP_NUM_THREADS": "1"}
            self.processes.append(_SERVER.Process(target=_rank, args=(target, arguments, told | environment, log)))
        _RUNS.append(self)
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 540) -> list[int]:
        """Wait for the ranks to end, and return their exit statuses; the negative number for a signal.

        The default only shows the output of ranks that hang before pytest's own limit of 600 s ends the test.
        """
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        alive = [process for process in self.processes if process.is_alive()]
        self.kill(signal.SIGKILL)
        assert not alive, f"{len(alive)} ranks were still running after {timeout} s:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def done(self) -> None:
        """Wait for the ranks, and check that none failed."""
        assert self.wait() == [0] * len(self.processes), self.output()

    def kill(self, number: int) -> None:
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)
        if number == signal.SIGKILL:
            for process in self.processes:
                if process.pid is not None:
                    process.join()

    def output(self) -> str:
        return "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in self.logs if log.exists())


def _rank(target: Callable, arguments: tuple, environment: dict[str, str], log: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("PYTEST", "SLURM"))]:
        del os.environ[name]
    os.environ.update(environment)
    # By default the server would start the workers of the data, too. A real run forks them.
    multiprocessing.set_start_method("fork", force=True)
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    target(*arguments)
