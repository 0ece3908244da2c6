"""Processes that are forked from a server."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver

import pytest

from cola_lightning.compare import processes
from cola_lightning.output_files import write_whole

LOOKS = """
import torch
def refuse(*arguments):
    raise AssertionError("asked for a GPU at import")
torch.accelerator.is_available = torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = refuse
import cola_lightning.benchmark, cola_lightning.cli.commands.benchmark, cola_lightning.cli.lightning_cli
import cola_lightning.compare.sweep, cola_lightning.data, cola_lightning.methods
import importlib.util
if importlib.util.find_spec("lm_eval"):  # the server imports it for a plan with tasks
    import lm_eval.models.huggingface
"""


@pytest.mark.slow
def test_the_server_looks_for_no_gpu():
    """A process cannot use a GPU that its parent has initialized. The environment has the answer of the comparison."""
    environment = {"DS_ACCELERATOR": "cuda", "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    environment |= {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", LOOKS], check=True, env=environment)


@pytest.mark.slow
def test_processes_that_end_while_others_start_have_not_failed(tmp_path, monkeypatch):
    """Each exit status can be read once. Reading takes long here, so that another thread can come in between."""
    read = forkserver.read_signed

    def read_slowly(file):
        time.sleep(0.01)
        return read(file)

    monkeypatch.setattr(forkserver, "read_signed", read_slowly)
    with ThreadPoolExecutor(6) as pool:
        statuses = list(pool.map(lambda n: processes.run(print, ("done",), tmp_path / f"{n}.log", 1), range(24)))
    assert statuses == [0] * 24
    assert {file.read_text() for file in tmp_path.iterdir()} == {"done\n"}


@pytest.mark.slow
def test_a_process_that_ctrl_c_ended_says_so(tmp_path):
    assert processes.run(signal.raise_signal, (signal.SIGINT,), tmp_path / "log", 1) == 130


def test_two_threads_that_write_one_file_at_a_time_do_not_disturb_each_other(tmp_path):
    file = tmp_path / "table.csv"
    texts = [f"{n}\n" * 20_000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: [write_whole(file, text) for _ in range(20)], texts))
    assert file.read_text() in texts
    assert list(tmp_path.iterdir()) == [file]


def test_files_that_differ_in_their_suffix_are_written_beside_each_other(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        for _ in range(50):
            list(pool.map(lambda name: write_whole(tmp_path / name, name), ["results.json", "results.csv"]))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "results.json": "results.json",
        "results.csv": "results.csv",
    }
