"""Worker processes of loaders: how they start, and how they end."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.synchronize import SemLock

import pytest
import torch

from cola_lightning.data.row_loader import TrainLoader
from cola_lightning.data.stream_loader import StreamError, StreamLoader, Verdict
from cola_lightning.data.worker_process import begin_worker, end_with_parent
from cola_lightning.errors import InputError
from tests.data.simulate import Numbers, make_logical_shards
from tests.data.test_stream_loader import alive
from tests.processes import Run
from tests.signal_phases import fit


def fail(worker: int) -> None:
    begin_worker(os.getppid(), worker)
    raise ValueError("a fault of the worker")


def end_of(target: Callable, *arguments: object, method: str = "fork") -> int | None:
    process = multiprocessing.get_context(method).Process(target=target, args=arguments)
    process.start()
    process.join(300)
    return process.exitcode


def test_a_worker_that_was_started_in_a_thread_of_a_pool_ends_with_0():
    """Python waits at the end of a process for the threads of pools. Here that was the worker's own thread, so that it
    ended with 1 and without a message."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(end_of, begin_worker, os.getpid(), 0).result() == 0


def test_a_worker_that_fails_ends_with_1_and_says_why(capfd):
    assert end_of(fail, 0) == 1
    assert "ValueError: a fault of the worker" in capfd.readouterr().err


def test_a_worker_ends_with_0_where_its_output_cannot_be_written():
    """What a worker printed is written at its end; the other end of the pipe may be closed, as by ``| head``."""

    def worker() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        sys.stdout = os.fdopen(1, "w")
        print("this stays in the buffer")
        begin_worker(os.getppid(), 0)

    assert end_of(worker) == 0


@pytest.mark.distributed
def test_a_worker_of_a_fork_server_sees_that_its_parent_lives():
    """Its parent is the server for the kernel, and "forkserver" is what Python 3.14 starts processes by."""
    assert end_of(begin_worker, os.getpid(), 0, method="forkserver") == 0


def start_and_die(number: Connection) -> None:
    """Start a worker by the fork server, and die."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.get_context("forkserver").Process(target=begin_and_report, args=(os.getpid(), writer))
    worker.start()
    reader.recv()
    number.send(worker.pid)
    os.kill(os.getpid(), signal.SIGKILL)


def begin_and_report(parent: int, ready: Connection) -> None:
    begin_worker(parent, 0)
    ready.send(True)
    time.sleep(60)


@pytest.mark.distributed
def test_a_worker_of_a_fork_server_ends_with_its_parent():
    """The server, which the kernel and PyTorch take for its parent, lives on."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    assert end_of(start_and_die, writer, method="forkserver") == -signal.SIGKILL
    worker = reader.recv()
    deadline = time.monotonic() + 60
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(worker)


@pytest.mark.distributed
def test_loaders_have_workers_under_a_fork_server():
    """As a trial of ``compare`` has, and every run under Python 3.14."""
    rows = [{"input_ids": torch.tensor([row]), "labels": torch.tensor([row])} for row in range(8)]
    read = {}
    before = multiprocessing.get_start_method()
    try:
        for method in ("fork", "forkserver"):
            multiprocessing.set_start_method(method, force=True)
            loaders = [TrainLoader(rows, 2, 4, seed=0, workers=1), StreamLoader(**STREAM)]
            read[method] = [next(iter(loader))["input_ids"].tolist() for loader in loaders]
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert read["forkserver"] == read["fork"]


def test_a_worker_without_its_parent_says_so_before_it_ends(capfd):
    assert end_of(end_with_parent, os.getpid() + 1) == 1
    assert f"error: process {os.getpid() + 1}, which started this worker" in capfd.readouterr().err


def begin_and_sleep(parent: int, ready: int) -> None:
    begin_worker(parent, 0)
    os.write(ready, b"\n")
    time.sleep(60)


def test_a_worker_ends_on_sigterm_of_its_parent_only():
    """PyTorch waits five seconds for a worker that it sent SIGTERM. A launcher sends it to all processes of a run."""
    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=begin_and_sleep, args=(os.getpid(), writer))
    process.start()
    os.read(reader, 1)
    subprocess.run(["kill", "-TERM", str(process.pid)], check=True)
    process.join(0.5)
    assert process.is_alive()
    began = time.monotonic()
    process.terminate()
    process.join(20)
    assert process.exitcode == 0
    assert time.monotonic() - began < 3
    os.close(reader)
    os.close(writer)


def fill_memory(patch: pytest.MonkeyPatch, room: int) -> None:
    """Let so many semaphores be made, and no more, as on a /dev/shm that becomes full."""
    make, made = SemLock.__init__, 0

    def limited(self, *arguments, **options):
        nonlocal made
        made += 1
        if made > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        make(self, *arguments, **options)

    patch.setattr(SemLock, "__init__", limited)


MAKE = make_logical_shards(Numbers([90]), num_logical_shards=4)
STREAM = {"make_logical_shards": MAKE, "num_logical_shards": 4, "batch_size": 1, "batches": 9, "workers": 2}


@pytest.mark.parametrize("room", [0, 3, 12])
@pytest.mark.parametrize("kind", ["stream", "rows"])
def test_if_there_is_no_room_for_semaphores_of_workers_one_line_says_so(monkeypatch, capfd, kind, room):
    """PyTorch's iterator, made in part, printed a second traceback at its deletion."""
    fill_memory(monkeypatch, room)
    loader = StreamLoader(**STREAM) if kind == "stream" else TrainLoader([{}] * 8, 2, 4, seed=0, workers=2)
    with pytest.raises(InputError) as refused:
        next(iter(loader))
    message = str(refused.value)
    assert message.startswith(
        "the 2 workers of the data could not be started: [Errno 28] No space left on device; make"
    )
    assert "\n" not in message
    assert "--data.num_workers 0" in message
    assert capfd.readouterr().err == ""


def test_ranks_agree_that_workers_of_one_could_not_be_started(monkeypatch):
    """The others would wait for it to read."""
    agreed = []
    fill_memory(monkeypatch, 0)
    loader = StreamLoader(**STREAM)
    loader.ranks.smallest = lambda number: agreed.append(number) or number
    with pytest.raises(StreamError, match="could not be started"):
        next(iter(loader))
    assert agreed == [Verdict.FAILED]


def test_if_the_system_starts_no_more_processes_one_line_says_so(monkeypatch):
    def refuse(self):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(multiprocessing.Process, "start", refuse)
    with pytest.raises(StreamError, match=r"could not be started: .* temporarily unavailable; make room"):
        next(iter(StreamLoader(**STREAM)))


def fit_where_one_rank_has_no_room(flags: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            fill_memory(patch, 0)
        fit(flags)


@pytest.mark.distributed
def test_all_ranks_end_if_the_workers_of_one_cannot_start(tiny_run, tmp_path):
    """The rank whose workers could not be started says so in one line; the other one does not wait for it."""
    flags = ["fit", *tiny_run, f"--run_dir={tmp_path / 'run'}", "--trainer.devices=2", "--trainer.strategy=ddp"]
    run = Run(fit_where_one_rank_has_no_room, [*flags, "--data.num_workers=1"], ranks=2, folder=tmp_path)
    assert run.wait(60) == [1, 2], run.output()
    said = [log.read_text() for log in run.logs]
    assert "Traceback" not in "".join(said)
    assert "error: another process of this run ended; its output says why (" in said[0]
    [line] = [line for line in said[1].splitlines() if line.startswith("error:")]
    assert "the 1 workers of the data could not be started: [Errno 28] No space left on device" in line
