"""Refuse checkpoints that name code in their plain data, leave their folder, or claim more data than they hold.

Every command that opens a checkpoint is tested. Hostile code would make a file, the trace.
"""

import os
import pickle
import shutil
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import lightning.pytorch.strategies.fsdp
import pytest
import torch
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint import CheckpointException

from cola_lightning.checkpoints import check_named_code, check_no_code, plain_data_only, read
from cola_lightning.checkpoints.manifest import checksum, contents, write_manifest
from cola_lightning.cli.app import main
from cola_lightning.errors import InputError
from cola_lightning.training.module import LanguageModel

pytestmark = pytest.mark.slow


@pytest.fixture
def trace(tmp_path, monkeypatch) -> Path:
    """Return the file that hostile code makes. The working directory has a module that makes it when imported."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    trace = tmp_path / "trace"
    Path("evil_module.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil:\n    pass\n")
    Path("text.txt").write_text("the law of the land")
    Path("evil").write_text(popen(trace, as_text=True))
    yield trace
    sys.modules.pop("evil_module", None)
    assert not trace.exists(), "code has run"


def popen(trace: Path, as_text: bool = False):
    spec = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(trace)]}}
    return f"class_path: subprocess.Popen\ninit_args: {{args: [touch, {trace}]}}\n" if as_text else spec


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


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def evil_file(folder: Path, trace: Path) -> Path:
    torch.save({"state_dict": {}, "x": Evil(trace)}, folder / "evil.ckpt")
    return folder / "evil.ckpt"


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_unpickles_a_file(command, tiny_run, trace, tmp_path, capsys):
    assert "asks to load posix.mkdir" in refused(command, evil_file(tmp_path, trace), tiny_run, capsys)


LOADERS = {
    "torch.load": lambda path: torch.load(path, weights_only=False),
    "Lightning's FSDP": lambda path: lightning.pytorch.strategies.fsdp._lazy_load(path),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_no_loader_of_a_library_unpickles(loader, trace, tmp_path, monkeypatch):
    """The loaders are safe without an earlier check, because a file could be replaced after the check."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = evil_file(tmp_path, trace)
    with plain_data_only(), pytest.raises(pickle.UnpicklingError, match="mkdir"):
        LOADERS[loader](path)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards.ckpt"
    state = {"state_dict": {"network.w": torch.arange(6.0)}, "optimizer_0": {"lr": 0.1}}
    sharded.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 3, "hyper_parameters": {}}, folder / "meta.pt")
    return folder


def test_torch_reads_the_index_without_pickle(shards, trace):
    (shards / ".metadata").write_bytes(pickle.dumps(Evil(trace)))
    with plain_data_only(), pytest.raises(CheckpointException) as stop:
        sharded.load({"state_dict": {"network.w": torch.zeros(6)}}, checkpoint_id=shards, no_dist=True)
    assert ".metadata asks to load posix.mkdir" in str(stop.value.failures[0][0])


def test_torch_does_not_unpickle_data_other_than_tensors(tmp_path, trace):
    folder = tmp_path / "bytes.ckpt"
    sharded.save({"x": Evil(trace)}, checkpoint_id=folder, no_dist=True)
    if trace.exists():
        trace.rmdir()  # saving copies the object, which runs its code
    with plain_data_only(), pytest.raises(CheckpointException) as stop:
        sharded.load({"x": None}, checkpoint_id=folder, no_dist=True)
    assert "GLOBAL posix.mkdir" in str(stop.value.failures[0][0])


@pytest.mark.parametrize("kind", ["file", "folder", "index"])
def test_a_link_that_leaves_the_folder_is_refused(shards, tmp_path, trace, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    evil_file(elsewhere, trace).rename(elsewhere / "evil_states.pt")
    match kind:
        case "file":
            (shards / "more.pt").symlink_to(elsewhere / "evil_states.pt")
        case "folder":
            (shards / "checkpoint").symlink_to(elsewhere)
        case "index":
            shutil.move(shards / ".metadata", elsewhere / ".metadata")
            (shards / ".metadata").symlink_to(elsewhere / ".metadata")
    with pytest.raises(InputError, match=r"is a link to .*, outside of the checkpoint"):
        check_no_code(shards)


def test_a_link_to_a_folder_in_the_checkpoint_is_refused(shards):
    (shards / "inner").mkdir()
    (shards / "checkpoint").symlink_to("inner")
    with pytest.raises(InputError, match="is a link to a folder, which no strategy writes"):
        check_no_code(shards)


def test_a_link_to_a_file_in_the_checkpoint_is_followed(shards):
    (shards / "kept.pt").symlink_to("meta.pt")
    check_no_code(shards)


@pytest.mark.parametrize("place", ["../meta.pt", "/etc/passwd", "inner/__0_0.distcp"])
def test_an_index_that_points_outside_is_refused(shards, place):
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = place
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="outside of the checkpoint"):
        check_no_code(shards)


def test_an_index_that_claims_too_much_data_is_refused(shards):
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    metadata.state_dict_metadata["state_dict.network.w"].size = torch.Size([10**15])
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    for look in (check_no_code, read):
        with pytest.raises(InputError, match=r"claims 4,000,000,000,000,000 bytes of tensors, but the folder holds"):
            look(shards)


@pytest.mark.parametrize("kind", ["packed", "twice"])
def test_an_archive_that_torch_would_not_write_is_refused(tmp_path, kind):
    path = tmp_path / "a.ckpt"
    torch.save({"w": torch.zeros(10)}, tmp_path / "whole.ckpt")
    with ZipFile(tmp_path / "whole.ckpt") as whole, ZipFile(path, "w") as archive:
        for part in whole.namelist():
            archive.writestr(part, whole.read(part), ZIP_DEFLATED if kind == "packed" else None)
        if kind == "packed":  # a gigabyte in a megabyte
            archive.writestr("whole/data/9", bytes(2**26), ZIP_DEFLATED)
        else:
            archive.writestr("whole/data.pkl", b"other")
    with pytest.raises(InputError, match="is packed" if kind == "packed" else "two parts of one name"):
        check_no_code(path)


def test_a_linked_folder_of_deepspeed_is_refused_under_validate(shards, tmp_path, trace, tiny_run, capsys):
    folder = tmp_path / "deepspeed.ckpt"
    (folder / "real").mkdir(parents=True)
    evil_file(folder / "real", trace).rename(folder / "real" / "mp_rank_00_model_states.pt")
    (folder / "checkpoint").symlink_to("real")
    (folder / "latest").write_text("checkpoint")
    write_manifest(folder, {name: checksum(folder / name) for name in contents(folder)})
    assert "link to a folder" in refused("validate", folder, tiny_run, capsys)
