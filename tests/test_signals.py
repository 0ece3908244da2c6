"""Send signals from the first moment of a command on. ``training/test_preemption`` sends them to several ranks."""

import os
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import lightning as L
import pytest

from cola_lightning.__main__ import main as command
from cola_lightning.callbacks.checkpoints import UnsavedError
from cola_lightning.checkpoints import find_corruption, lock
from cola_lightning.cli.app import CLOSED_PIPE
from cola_lightning.errors import InputError
from cola_lightning.signals import STOP
from cola_lightning.training.preemption import own_signals
from tests.processes import Run
from tests.signal_outcomes import Trial, documented_statuses, faults
from tests.signal_phases import fit
from tests.signal_run import Attack, flags

pytestmark = pytest.mark.distributed


def test_random_signals_change_nothing_and_leave_nothing(tmp_path):
    """Run a sample of the trials of ``python -m tests.signal_run``."""
    attack = Attack(flags(tmp_path), tmp_path, seed=5)
    trials = attack.run(30, ["ddp", "fsdp2"])
    wrong = faults(trials, attack.seed)
    if wrong:
        pytest.fail(wrong, pytrace=False)  # an assertion would cut the text
    assert trials
    assert attack.compared


def test_a_fault_is_reported_in_full():
    """A fault must name its trial and seed in full, so that it can be explained later."""
    trial = Trial("ddp", "SIGHUP", [0, 1], "end", 0.1, [0, 0], 1.0, False, True)
    trial.faults.append("/loops/total/ready differs: " + 1000 * "2 and 4 ")
    text = faults([trial], seed=7)
    assert "--seed 7" in text
    assert repr(trial.setup) in text
    assert "SIGHUP" in text
    assert trial.faults[0] in text
    assert not faults([Trial("ddp", "SIGHUP", [0], "end", 0.1, [0, 0], 1.0, False, True)], seed=7)


def test_the_table_of_exit_statuses_lists_every_status_of_the_commands():
    """``judge`` reads the table, so a status that it lacks is a fault of a run."""
    stopped = {128 + number for number in (*STOP, signal.SIGKILL, signal.SIGPIPE)}
    assert documented_statuses() == {0, InputError.exit_status, UnsavedError.exit_status, *stopped}
    assert 128 + signal.SIGPIPE == CLOSED_PIPE


def catches(process: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


def in_group(group: int) -> list[str]:
    """List the processes of a group that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # of one that has ended meanwhile
            name, _, rest = (folder / "stat").read_text().rpartition(")")
            state, _, its_group = rest.split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(name)
    return found


MOMENTS = {
    "it listens": lambda process: catches(process, signal.SIGTERM),
    "it imports torch": lambda process: "libtorch_python" in Path(f"/proc/{process}/maps").read_text(),
}
"""Moments of the first seconds of a command, by what shows them."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [*STOP, signal.SIGKILL])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_during_the_imports_of_a_real_command_ends_it_at_once(tmp_path, moment, number):
    """``tests.signal_run`` forks its processes after the imports, so that it sends no signal before."""
    root = Path(__file__).parent.parent
    fit_command = [sys.executable, "-m", "cola_lightning", "fit", "--config", "configs/quickstart.yaml"]
    said = tmp_path / "said"
    with said.open("w") as output:
        process = subprocess.Popen(
            [*fit_command, f"--run_dir={tmp_path / 'run'}"],
            cwd=root, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not MOMENTS[moment](process.pid):
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, number)
        status = process.wait(30)
        assert (status if status >= 0 else 128 - status) == 128 + number  # as a shell reports it
        deadline = time.monotonic() + 60
        while (left := in_group(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    text = said.read_text()
    assert "Traceback" not in text
    told = f"{number.name} before training began: ended at once, nothing was lost by that"
    assert text.strip() == ("" if number == signal.SIGKILL else told)
    assert not (tmp_path / "run").exists()


def test_ctrl_c_while_the_command_line_is_imported_is_one_line(monkeypatch, capsys):
    """A command without a Trainer ended in a traceback then."""

    class Interrupted(ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "cola_lightning.cli.app", Interrupted("cola_lightning.cli.app"))
    monkeypatch.setattr(sys, "argv", ["cola_lightning", "estimate"])
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "error: ended by Ctrl-C\n"


class Sleep(L.Callback):
    """Sleep at a named hook, and write a file when it begins."""

    def __init__(self, where: str, sign: str, seconds: float = 60.0) -> None:
        self.where, self.sign, self.seconds = where, Path(sign), seconds

    def setup(self, trainer, pl_module, stage):
        self._sleep("setup")

    def on_sanity_check_start(self, trainer, pl_module):
        self._sleep("sanity")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            self._sleep("step")

    def _sleep(self, where):
        if where == self.where:
            self.sign.touch()
            time.sleep(self.seconds)


def start(folder, tiny_run, where, *more, seconds=60.0) -> Run:
    """Start a run that sleeps at a hook, and return when it sleeps."""
    sign = folder / "sign"
    callback = {"where": where, "sign": sign, "seconds": seconds}
    more = [*more, "--trainer.callbacks+=tests.test_signals.Sleep"]
    more += [f"--trainer.callbacks.{name}={value}" for name, value in callback.items()]
    run = Run(fit, ["fit", *tiny_run, f"--run_dir={folder / 'run'}", *more], ranks=1, folder=folder)
    wait_for(sign, run)
    return run


def wait_for(sign, run):
    deadline = time.monotonic() + 120
    while not sign.exists():
        assert time.monotonic() < deadline, run.output()
        assert any(process.is_alive() for process in run.processes), run.output()
        time.sleep(0.02)


@pytest.mark.parametrize(("where", "number"), [("setup", signal.SIGTERM), ("sanity", signal.SIGINT)])
def test_before_training_a_signal_ends_the_process_at_once(tiny_run, tmp_path, where, number):
    """With Lightning's handlers, SIGTERM ended with status 0, and SIGUSR1 wrote into the working directory."""
    run = start(tmp_path, tiny_run, where, "--trainer.num_sanity_val_steps=1")
    run.kill(number)
    assert run.wait(10) == [128 + number], run.output()
    assert "before training began: ended at once, nothing was lost" in run.output()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_end_a_run_with_a_checkpoint(tiny_run, tmp_path, number):
    run = start(tmp_path, tiny_run, "step", "--checkpoint.every_n_train_steps=1000", seconds=2)
    run.kill(number)
    assert run.wait(60) == [128 + number], run.output()
    assert "go on with --ckpt_path last" in run.output()
    folder = tmp_path / "run" / "checkpoints"
    assert os.readlink(folder / "last.ckpt") == "step_00000003.ckpt"
    assert find_corruption(folder / "last.ckpt") is None
    assert not (folder / lock.NAME).exists()


def test_a_second_ctrl_c_ends_at_once(tiny_run, tmp_path):
    run = start(tmp_path, tiny_run, "step")
    run.kill(signal.SIGINT)
    time.sleep(0.5)
    run.kill(signal.SIGINT)
    assert run.wait(10) == [128 + signal.SIGINT], run.output()


def test_a_rank_that_waits_for_one_that_is_gone_can_be_stopped(tiny_run, tmp_path):
    """The rank waits in a library, where Python runs no handler."""
    run = Run(
        fit, ["fit", *tiny_run, f"--run_dir={tmp_path / 'run'}", "--trainer.devices=2", "--trainer.strategy=ddp"],
        ranks=2, folder=tmp_path,
    )  # fmt: skip
    os.kill(run.processes[1].pid, signal.SIGKILL)
    wait_for(tmp_path / "run" / lock.NAME, run)
    time.sleep(1)
    os.kill(run.processes[0].pid, signal.SIGTERM)
    assert run.wait(10)[0] == 128 + signal.SIGTERM, run.output()


def test_lightning_neither_listens_nor_takes_a_file_from_the_working_directory(tmp_path, monkeypatch):
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "cola"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_checkpointing=False)
    assert trainer._checkpoint_connector._hpc_resume_path  # what Lightning would take
    handlers = [signal.getsignal(number) for number in STOP]
    own_signals(trainer)
    assert trainer._checkpoint_connector._hpc_resume_path is None
    trainer._signal_connector.register_signal_handlers()
    assert [signal.getsignal(number) for number in STOP] == handlers


def test_the_installed_script_begins_where_python_m_does():
    """Earlier, the script imported for seconds before it listened."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["cola_lightning"] == "cola_lightning.__main__:main"


@pytest.mark.parametrize("command", ["fit", "generate"])
def test_ctrl_c_during_the_first_imports_gives_no_traceback(command):
    """Let one of the first imports send the signal: of the module that handles signals."""
    code = (
        "import builtins, os, runpy, signal, sys\n"
        "usual = builtins.__import__\n"
        "def interrupted(name, scope=None, *args, **names):\n"
        "    if name == 'os' and (scope or {}).get('__name__') == '__main__': os.kill(os.getpid(), signal.SIGINT)\n"
        "    return usual(name, scope, *args, **names)\n"
        "builtins.__import__ = interrupted\n"
        f"sys.argv = ['cola_lightning', '{command}']\n"
        "runpy.run_module('cola_lightning', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""
