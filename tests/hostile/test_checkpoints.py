"""Refuse checkpoints that name code in their plain data. Every command that opens a checkpoint is tested."""

import sys
from pathlib import Path

import pytest
import torch

from cola_lightning.checkpoints import check_named_code, read
from cola_lightning.cli.app import main
from cola_lightning.errors import InputError
from cola_lightning.training.module import LanguageModel
from tests.hostile.conftest import evil_file, popen

pytestmark = pytest.mark.slow


def in_optimizer(argument):
    return {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": argument}}


def nested(depth: int, leaf):
    """Nest optimizers in optimizers, as HybridOptimizer takes them."""
    for _ in range(depth):
        leaf = {"class_path": "cola_lightning.optim.HybridOptimizer", "init_args": {"matrix": leaf, "other": leaf}}
    return leaf


PLACES = {
    "the optimizer": lambda code: {"optimizer": code},
    "the schedule": lambda code: {"schedule": code},
    "the projection": lambda code: {"projection": code},
    "a number": lambda code: {"num_hidden_layers": code},
    "a text": lambda code: {"initial_weights": code},
    "an unknown argument": lambda code: {"unknown": code},
    "an argument of the optimizer": lambda code: in_optimizer({"lr": code}),
    "an argument that may be anything": lambda code: in_optimizer({"foreach": code}),
    "an argument beyond the signature": lambda code: in_optimizer({"unknown": code}),
    "a list": lambda code: in_optimizer({"betas": [0.9, [code]]}),
    "a value of plain types": lambda code: {"rope_scaling": {"rope_type": code}},
    "a mapping": lambda code: in_optimizer({"lr": {"a": {"b": code}}}),
    "an optimizer of an optimizer": lambda code: {"optimizer": nested(3, code)},
    "a deep optimizer": lambda code: {"optimizer": nested(8, code)},
    "a function's place": lambda code: {
        "schedule": {"class_path": "torch.optim.lr_scheduler.CyclicLR", "init_args": {"scale_fn": code}}
    },
    "a place for any object": lambda code: {
        "optimizer": {
            "class_path": "torch.distributed.optim.ZeroRedundancyOptimizer",
            "init_args": {"optimizer_class": "torch.optim.AdamW", "process_group": code},
        }
    },
}
CODE = {
    "a command": popen,
    "a module in the working directory": lambda trace: {"class_path": "evil_module.Evil"},
    "the same by name": lambda trace: "evil_module.Evil",
    "a file of settings": lambda trace: "evil",
    "settings as text": lambda trace: popen(trace, as_text=True),
    "a function in a wrapper": lambda trace: {
        "class_path": "numpy.vectorize",
        "init_args": {"pyfunc": "os.system", "otypes": popen(trace)},
    },
    "what a module of the package imports": lambda trace: (
        popen(trace) | {"class_path": "cola_lightning.provenance.subprocess.Popen"}
    ),
    "the command line": lambda trace: {"class_path": "cola_lightning.__main__.main"},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("code", CODE)
def test_settings_of_a_checkpoint_that_name_code_are_refused(place, code, trace):
    settings = PLACES[place](CODE[code](trace))
    # A text is harmless where only a text or a number is expected.
    text = isinstance(CODE[code](trace), str)
    plain = text and place in ("a number", "a text", "a value of plain types", "an argument that may be anything")
    if plain:
        assert check_named_code(settings, LanguageModel, Path("a.ckpt")) == settings
        return
    with pytest.raises(InputError, match="the checkpoint is not used"):
        check_named_code(settings, LanguageModel, Path("a.ckpt"))
    assert "evil_module" not in sys.modules


def test_code_that_a_flag_names_is_accepted(trace):
    settings = {"projection": {"class_path": "numpy.vectorize", "init_args": {"cache": True}}}
    with pytest.raises(InputError, match=r"numpy\.vectorize for --model\.projection.* add --trust numpy\.vectorize"):
        check_named_code(settings, LanguageModel, Path("a.ckpt"))
    for trusted in ("numpy", "numpy.vectorize"):
        assert check_named_code(settings, LanguageModel, Path("a.ckpt"), [trusted]) == settings


def test_settings_of_this_package_stay_as_they_are(trained_run):
    settings = dict(read(trained_run / "checkpoints" / "last.ckpt").hyper_parameters)
    settings = {name: value for name, value in settings.items() if not name.startswith("_")}
    assert check_named_code(settings, LanguageModel, Path("a.ckpt")) == settings
    deep = {"optimizer": nested(3, {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}})}
    assert check_named_code(deep, LanguageModel, Path("a.ckpt")) == deep


COMMANDS = {
    "fit": lambda path, run: ["fit", *run, f"--ckpt_path={path}", "--run_dir=out"],
    "validate": lambda path, run: ["validate", *run, f"--ckpt_path={path}"],
    "test": lambda path, run: ["test", *run, f"--ckpt_path={path}"],
    "predict": lambda path, run: ["predict", *run, f"--ckpt_path={path}"],
    "generate": lambda path, run: ["generate", str(path), "--prompt", "the", "--tokenizer", str(path.parent)],
    "evaluate": lambda path, run: ["evaluate", str(path), "--text", "text.txt"],
    "export": lambda path, run: ["export", str(path), "out"],
    "factorize": lambda path, run: ["factorize", str(path), "out", "--projection.rank=4"],
}


def refused(command, path, flags, capsys) -> str:
    """Return the one line with which a command refuses a file, before it writes anything."""
    with pytest.raises(SystemExit) as stop:
        main(COMMANDS[command](path, flags))
    shown = capsys.readouterr().err
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2, shown
    assert len(errors) == 1, shown
    assert "Traceback" not in shown
    assert not Path("out").exists()
    return errors[0]


@pytest.fixture
def altered(trained_run, tmp_path):
    """Make a valid checkpoint with changed hyper-parameters."""

    def made(**settings) -> Path:
        state = torch.load(trained_run / "checkpoints" / "last.ckpt", weights_only=True)
        state["hyper_parameters"] |= settings
        torch.save(state, tmp_path / "altered.ckpt")
        return tmp_path / "altered.ckpt"

    return made


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_code_that_a_checkpoint_names(command, altered, tiny_run, trace, capsys):
    silent = [flag for flag in tiny_run if not flag.startswith(("--model.projection", "--model.optimizer"))]
    for code in ({"class_path": "evil_module.Evil"}, popen(trace)):
        line = refused(command, altered(projection=code), silent, capsys)
        assert "which is in none of cola_lightning, torch.optim, torch.nn" in line
    if command in ("fit", "validate", "test", "predict"):
        path = altered(**PLACES["a function's place"](popen(trace)))
        assert "where none belongs" in refused(command, path, silent, capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_builds_more_layers_than_a_checkpoint_has(command, altered, tiny_run, trace, capsys):
    silent = [flag for flag in tiny_run if not flag.startswith("--model.num_hidden_layers")]
    line = refused(command, altered(num_hidden_layers=10**9), silent, capsys)
    assert "num_hidden_layers is 1000000000 in them, 2 in the weights" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_unpickles_a_file(command, tiny_run, trace, tmp_path, capsys):
    assert "asks to load posix.mkdir" in refused(command, evil_file(tmp_path, trace), tiny_run, capsys)
