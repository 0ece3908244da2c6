"""Refuse configs that name commands of the standard library, or scripts in the working directory."""

import sys
from pathlib import Path

import pytest
import yaml

from cola_lightning.cli.app import main

pytestmark = pytest.mark.slow

POPEN = "subprocess.Popen"


@pytest.fixture(autouse=True)
def trace(tmp_path, monkeypatch):
    """Return the file that the script in the working directory, and the command in a config, would make."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    trace = tmp_path / "trace"
    Path("evil_script.py").write_text(f"open({str(trace)!r}, 'w')\n")
    yield trace
    sys.modules.pop("evil_script", None)
    assert not trace.exists(), "code has run"


def command(trace, class_path=POPEN):
    return {"class_path": class_path, "init_args": {"args": ["touch", str(trace)]}}


PLACES = {
    "a strategy's state": lambda code: {
        "trainer": {"strategy": {"class_path": "DDPStrategy", "init_args": {"ddp_comm_state": code}}}
    },
    "a strategy": lambda code: {"trainer": {"strategy": code}},
    "a logger": lambda code: {"trainer": {"logger": code}},
    "loggers": lambda code: {"trainer": {"logger": [code]}},
    "callbacks": lambda code: {"trainer": {"callbacks": [code]}},
    "more callbacks": lambda code: {"trainer": {"callbacks+": [code]}},
    "plugins": lambda code: {"trainer": {"plugins": [code]}},
    "a profiler": lambda code: {"trainer": {"profiler": code}},
    "the optimizer": lambda code: {"model": {"optimizer": code}},
    "the schedule": lambda code: {"model": {"schedule": code}},
    "the projection": lambda code: {"model": {"projection": code}},
    "the data": lambda code: {"data": code},
    "a function of the schedule": lambda code: {
        "model": {"schedule": {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": code}}}
    },
    "an optimizer's argument": lambda code: {
        "model": {
            "optimizer": {
                "class_path": "torch.distributed.optim.ZeroRedundancyOptimizer",
                "init_args": {"optimizer_class": "torch.optim.AdamW", "process_group": code},
            }
        }
    },
}
CODE = {
    "a command": command,
    "the command by another module": lambda trace: command(trace, "cola_lightning.provenance.subprocess.Popen"),
    "a command by its text": lambda trace: POPEN,
    "a script": lambda trace: {"class_path": "evil_script.main"},
    "a script by its text": lambda trace: "evil_script.main",
}


@pytest.mark.parametrize("command", ["fit", "estimate"])
@pytest.mark.parametrize("place", PLACES)
def test_a_config_does_not_run_a_command_or_a_script(place, command, tiny_run, trace, capsys):
    flags = [flag for flag in tiny_run if not flag.startswith(("--model.projection", "--model.schedule", "--data"))]
    for code in CODE.values():
        Path("evil.yaml").write_text(yaml.safe_dump(PLACES[place](code(trace))))
        with pytest.raises(SystemExit) as stop:
            main(
                [
                    command,
                    *flags,
                    "--config=evil.yaml",
                    "--print_config" if command == "fit" else "--trainer.max_steps=1",
                ]
            )
        shown = capsys.readouterr()
        if stop.value.code:
            assert shown.err.splitlines()[-1].startswith("error: "), shown.err
        else:  # a parameter of any type keeps the mapping as it is
            assert "state" in place or "argument" in place or place in ("a strategy", "a profiler")
        assert "evil_script" not in sys.modules
