"""How the processes of a run end when another one is gone or hangs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cola_lightning import loggers as board
from cola_lightning.data.worker_process import end_on_unsendable_batch
from cola_lightning.training.rank_processes import limit_rendezvous
from tests.processes import Run

pytestmark = pytest.mark.distributed


def find_no_one() -> None:
    strategy = SimpleNamespace(setup_environment=lambda: time.sleep(60))
    limit_rendezvous(SimpleNamespace(strategy=strategy, world_size=4, global_rank=2), seconds=0.2)
    strategy.setup_environment()


def test_ranks_that_do_not_find_each_other_end_in_the_stated_time(tmp_path):
    run = Run(find_no_one, ranks=1, folder=tmp_path)
    assert run.wait(20) == [1]
    assert "error: rank 2 did not find the other 3 ranks of this run within 0 s" in run.output()


def test_an_event_file_that_cannot_be_closed_does_not_keep_a_run_from_ending(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "SECONDS_TO_CLOSE", 0.1)
    stuck = SimpleNamespace(close=lambda: time.sleep(30), get_logdir=lambda: str(tmp_path))
    began = time.monotonic()
    with pytest.warns(UserWarning, match="could not be closed"):
        board.FaultTolerantWriter(stuck).close()
    assert time.monotonic() - began < 20


class Unsendable(Dataset):
    """Data set with an item that cannot be sent to another process."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return lambda: None


def test_a_batch_that_cannot_be_sent_ends_the_worker_at_once(capfd):
    loader = DataLoader(
        Unsendable(), batch_size=None, num_workers=1, worker_init_fn=lambda _: end_on_unsendable_batch()
    )
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        next(iter(loader))
    assert "could not send a batch" in capfd.readouterr().err
    assert torch.utils.data.get_worker_info() is None


RANK = """
import time
from cola_lightning import signals
signals.die_with_launcher()
print("ready", flush=True)
time.sleep(600)
"""


LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
rank.stdout.readline()
print(rank.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_rank_dies_with_a_launcher_that_is_killed():
    environment = os.environ | {"LOCAL_RANK": "1"}
    launch = [sys.executable, "-c", LAUNCHER, RANK]
    root = Path(__file__).parent.parent
    with subprocess.Popen(launch, stdout=subprocess.PIPE, text=True, cwd=root, env=environment) as launcher:
        rank = int(launcher.stdout.readline())
        os.kill(rank, 0)  # it is there
        launcher.kill()
    deadline = time.monotonic() + 10
    while is_running(rank):
        if time.monotonic() > deadline:
            os.kill(rank, signal.SIGKILL)
            pytest.fail("the rank outlived its launcher by 10 s")
        time.sleep(0.02)


def is_running(process: int) -> bool:
    """Whether a process has not ended. A zombie has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
