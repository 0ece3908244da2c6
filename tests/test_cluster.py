"""Run the SLURM recipe with replacements of ``srun`` and ``scontrol``."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from cola_lightning.checkpoints import read
from tests.conftest import REPOSITORY
from tests.training.test_preemption import slow, steps

pytestmark = pytest.mark.distributed

# Start the tasks of one node as SLURM does, each with its number. SLURM sends signals to the tasks.
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do shift; done
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" &
  echo $! >> "$TASKS"
  pids="$pids $!"
done
status=0
for pid in $pids; do wait $pid || status=$?; done
exit $status
"""
SCONTROL = '#!/bin/bash\necho "$@" >> "$REQUEUED"\n'


@pytest.fixture
def flags(tiny_run):
    return [
        *tiny_run, "--data.tokenizer=null", "--data.global_batch_size=null", "--trainer.precision=32-true",
        "--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.num_nodes=1", "--trainer.max_steps=40",
        "--trainer.val_check_interval=null", "--trainer.limit_val_batches=0", "--checkpoint.every_n_train_steps=5",
    ]  # fmt: skip


@pytest.fixture
def environment(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "SLURM"))}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return kept | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def end_group(leader):
    """End the tasks that a failed test has left."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def await_steps(process, life, wanted):
    deadline = time.monotonic() + 300
    while steps(life) < wanted:
        assert process.poll() is None, process.communicate()[0][:9000]
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.05)


def assert_same_end(tmp_path, *names):
    first, second = (read(tmp_path / name / "checkpoints" / "last.ckpt") for name in names)
    assert first.step == second.step == 40
    assert all(torch.equal(weight, second.weights[name]) for name, weight in first.weights.items())


def test_a_slurm_job_is_requeued_before_its_time_limit_and_goes_on(tmp_path, flags, environment, request):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    life, tasks = tmp_path / "life", tmp_path / "tasks"
    environment |= {
        "PATH": f"{tmp_path / 'bin'}:{environment['PATH']}",
        "TASKS": str(tasks),
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "cola",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": "1",
    }

    def job(name, *more):
        command = ["bash", "recipes/cluster/slurm.sh", *flags, f"--run_dir={tmp_path / name}", *more]
        process = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        request.addfinalizer(lambda: end_group(process.pid))
        return process

    first = job("requeued_run", *slow(life))
    await_steps(first, life, 4)
    for task in tasks.read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    output, _ = first.communicate(timeout=400)
    assert first.returncode == 128 + signal.SIGUSR1, output[-3000:]
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    stopped = int(re.search(r"Stopping after step (\d+)", output)[1])
    assert stopped < 40

    for name in ("requeued_run", "whole_run"):
        process = job(name)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output[-3000:]
        assert (f"step_{stopped:08}.ckpt" in output) == (name == "requeued_run")
    assert_same_end(tmp_path, "requeued_run", "whole_run")
