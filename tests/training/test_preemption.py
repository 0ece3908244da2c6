"""Real processes under the real command line, told to stop, killed, and started again."""

import os
import random
import signal
import time
from pathlib import Path

import lightning as L
import pytest
import torch

from cola_lightning.checkpoints import find_corruption, read
from cola_lightning.cli.app import main
from cola_lightning.training.preemption import requeue
from tests.processes import Run

pytestmark = pytest.mark.distributed


class Slow(L.Callback):
    """Time to be hit by a signal, and a sign of life: one byte of a file for each step."""

    def __init__(self, life: str, seconds: float = 0.05) -> None:
        self.life, self.seconds = Path(life), seconds

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(self.seconds)
        with self.life.open("a") as file:
            file.write(".")


@pytest.fixture
def start(tiny_run, tmp_path):
    """Start two ranks of a run in ``tmp_path/NAME``, which goes on from its last checkpoint, if there is one."""

    def started(name: str, *flags: str, ranks: int = 2, **environment: str) -> Run:
        flags = (
            *tiny_run, f"--run_dir={tmp_path / name}", "--ckpt_path=last", "--trainer.strategy=ddp",
            f"--trainer.devices={ranks}", "--checkpoint.every_n_train_steps=3", "--trainer.val_check_interval=null",
            "--trainer.limit_val_batches=0", *flags,
        )  # fmt: skip
        return Run(main, ["fit", *flags], ranks=ranks, folder=tmp_path / name, **environment)

    return started


def slow(life: Path) -> list[str]:
    return ["--trainer.callbacks+=tests.training.test_preemption.Slow", f"--trainer.callbacks.life={life}"]


def steps(life: Path) -> int:
    return life.stat().st_size if life.exists() else 0


def await_step(run: Run, life: Path, since: int) -> None:
    deadline = time.monotonic() + 300
    while steps(life) == since:
        assert any(process.is_alive() for process in run.processes), run.output()
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.01)


def test_ten_signals_in_a_row_change_nothing(start, tmp_path):
    """SIGTERM and SIGKILL by turns, to one rank or to both, at random moments."""
    length = "--trainer.max_steps=150"
    unbroken = start("unbroken", length)
    draw, life = random.Random(5), tmp_path / "life"
    for attempt in range(10):
        before = steps(life)
        run = start("broken", length, *slow(life))
        await_step(run, life, before)
        time.sleep(draw.uniform(0, 0.5))
        number = signal.SIGTERM if attempt % 2 else signal.SIGKILL
        for process in draw.choice([run.processes, run.processes[:1], run.processes[1:]]):
            os.kill(process.pid, number)
        first, second = run.wait()
        if number == signal.SIGTERM:
            assert (first, second) == (128 + signal.SIGTERM, 0), run.output()
        else:
            assert -signal.SIGKILL in (first, second), run.output()
            assert 0 not in (first, second), run.output()
    start("broken", length).done()
    unbroken.done()
    ends = [read(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("unbroken", "broken")]
    assert [end.step for end in ends] == [150, 150]
    for name, weight in ends[0].weights.items():
        assert torch.equal(weight, ends[1].weights[name]), name


def test_a_signal_to_one_rank_ends_all_after_a_whole_step(start, tmp_path):
    """Also in the middle of gathering gradients over several batches: the checkpoint is of a step, and whole."""
    life, folder = tmp_path / "life", tmp_path / "run" / "checkpoints"
    many = ["--trainer.max_steps=500", "--trainer.accumulate_grad_batches=4", "--checkpoint.every_n_train_steps=400"]
    run = start("run", *many, *slow(life))
    await_step(run, life, 0)
    os.kill(run.processes[1].pid, signal.SIGTERM)
    assert run.wait() == [128 + signal.SIGTERM, 0], run.output()
    [path] = (path for path in folder.glob("*.ckpt") if not path.is_symlink())
    assert find_corruption(path) is None
    assert (folder / "last.ckpt").resolve() == path
    step = read(path).step
    assert 1 <= step <= 4
    assert f"Stopping after step {step}, because signal 15 was received" in run.output()


@pytest.mark.parametrize("gone", [0, 1])
def test_if_one_rank_is_gone_the_other_stops_within_the_stated_time(start, tmp_path, gone):
    """Ten seconds, as recipes/cluster says; and the run goes on from its checkpoint."""
    life, flags = tmp_path / "life", ("--checkpoint.every_n_train_steps=1", "--trainer.max_steps=2000")
    run = start("run", *flags, *slow(life))
    while steps(life) < 8:  # some steps of both
        await_step(run, life, steps(life))
    os.kill(run.processes[gone].pid, signal.SIGKILL)
    statuses = run.wait(timeout=10)
    assert (statuses[gone], statuses[1 - gone]) == (-signal.SIGKILL, 1)
    saved = read(tmp_path / "run" / "checkpoints" / "last.ckpt").step
    start("run", *flags, f"--trainer.max_steps={saved + 1}").done()
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt").step == saved + 1


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Return a ``scontrol`` that writes down how it was called."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "requeued"}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return tmp_path / "requeued"


def test_slurm_requeues_only_after_its_warning_of_the_time_limit(scontrol, monkeypatch):
    requeue(signal.SIGUSR1)  # not under SLURM
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    requeue(signal.SIGTERM)
    assert not scontrol.exists()
    requeue(signal.SIGUSR1)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "120")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue(signal.SIGUSR1)
    assert scontrol.read_text() == "requeue 123\nrequeue 120_3\n"


def test_a_job_that_cannot_be_requeued_is_reported(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.warns(UserWarning, match="job 123 was not requeued .*scontrol"):
        requeue(signal.SIGUSR1)
