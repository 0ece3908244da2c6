"""Refuse whole checkpoints that a run cannot resume from."""

import shutil

import lightning as L
import pytest
import torch
from deepspeed.checkpoint import constants
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed import checkpoint as sharded

from cola_lightning.checkpoints import read
from cola_lightning.checkpoints.formats import weights_in_parts
from cola_lightning.checkpoints.manifest import checksum, contents, write_manifest
from cola_lightning.checkpoints.restore import explain_settings
from cola_lightning.cli.app import main
from cola_lightning.errors import InputError
from cola_lightning.training.module import LanguageModel

pytestmark = pytest.mark.slow


@pytest.fixture
def altered(trained_run, tmp_path):
    """Make a changed copy of a run's last checkpoint; the function that is passed changes its content."""

    def made(change) -> str:
        state = torch.load(trained_run / "checkpoints" / "last.ckpt", weights_only=True)
        change(state)
        torch.save(state, tmp_path / "altered.ckpt")
        return str(tmp_path / "altered.ckpt")

    return made


def refused(args, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args)
    shown = capsys.readouterr().err
    assert stop.value.code, shown
    assert "Traceback" not in shown
    return next(line for line in shown.splitlines() if line.startswith("error: "))


LACKING = {
    "optimizer_states": "states of the optimizer",
    "lr_schedulers": "a state of the learning-rate schedule",
    "loops": "a count of steps",
    "TextDataModule": "position in the data",
}


@pytest.mark.parametrize("part", LACKING)
def test_a_run_does_not_resume_without(part, altered, tiny_run, tmp_path, capsys):
    path = altered(lambda state: state.pop(part))
    line = refused(["fit", *tiny_run, f"--ckpt_path={path}", f"--run_dir={tmp_path / 'out'}"], capsys)
    assert f"altered.ckpt holds no {LACKING[part]}" in line
    assert "--weights_only_start true" in line


def test_a_flag_begins_a_new_run_with_the_weights(altered, tiny_run, tmp_path):
    path = altered(lambda state: [state.pop(part) for part in LACKING])
    flags = [flag for flag in tiny_run if not flag.startswith("--trainer.max_steps")]
    flags += [
        f"--ckpt_path={path}",
        "--weights_only_start=true",
        "--trainer.max_steps=1",
        "--model.optimizer.lr=0",
        "--trainer.val_check_interval=1",
    ]
    main(["fit", *flags, f"--run_dir={tmp_path / 'out'}"])
    began, ended = read(path), read(tmp_path / "out" / "checkpoints" / "last.ckpt")
    assert ended.step == 1
    assert all(torch.equal(weight, ended.weights[name]) for name, weight in began.weights.items())


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_weights_with_nan_are_refused_unless_a_flag_allows_them(command, altered, tiny_run, tmp_path, capsys):
    path = altered(lambda state: next(iter(state["state_dict"].values())).view(-1)[:1].fill_(float("nan")))
    flags = [command, *tiny_run, f"--ckpt_path={path}", f"--run_dir={tmp_path / 'out'}"]
    assert "holds NaN or infinity; take an earlier checkpoint, or add --allow_nan true" in refused(flags, capsys)
    if command == "validate":
        main([*flags, "--allow_nan=true"])


def as_shards(state, folder, place):
    """Write a state in shards, as FSDP2 does."""
    sharded.save({"state_dict": state.pop("state_dict")}, checkpoint_id=folder, no_dist=True)
    torch.save(state, folder / "meta.pt")


def as_deepspeed(state, folder, place):
    """Write a state as ZeRO does: a file of the weights, and flat float32 masters for each rank."""
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "latest").write_text("checkpoint")
    module = state.pop("state_dict")
    masters = [torch.cat([weight.flatten() for weight in module.values()])]
    if place in ("single_partition_of_fp32_groups", "fp32_flat_groups"):
        module = {name: torch.zeros(1) for name in module}
        states = {"optimizer_state_dict": {place: masters}}
        torch.save(states, folder / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    torch.save({"module": module, **state}, folder / "checkpoint" / "mp_rank_00_model_states.pt")


FOLDERS = [
    (as_shards, "network.model.layers.0.mlp.down_proj.A.weight"),
    (as_deepspeed, "mp_rank_00_model_states.pt: network.model.layers.0.mlp.down_proj.A.weight"),
    (as_deepspeed, constants.SINGLE_PARTITION_OF_FP32_GROUPS),
    (as_deepspeed, constants.FP32_FLAT_GROUPS),
]


@pytest.mark.parametrize(("write", "place"), FOLDERS, ids=lambda value: getattr(value, "__name__", value))
def test_weights_with_nan_in_a_folder_are_refused(write, place, trained_run, tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cola_lightning.checkpoints.formats.PART", 1000)  # bytes, to read several parts
    folder, lines = tmp_path / "folder.ckpt", []
    for value in (0.0, float("nan")):
        state = torch.load(trained_run / "checkpoints" / "last.ckpt", weights_only=True)
        state["state_dict"]["network.model.layers.0.mlp.down_proj.A.weight"][-1, -1] = value
        write(state, folder, place)
        write_manifest(folder, {name: checksum(folder / name) for name in contents(folder)})
        assert len(list(weights_in_parts(folder))) == (2 if "fp32" in place else 1) or write is as_shards
        lines.append(refused(["validate", *tiny_run, f"--ckpt_path={folder}", f"--run_dir={tmp_path / 'out'}"], capsys))
        shutil.rmtree(folder)
    assert "NaN" not in lines[0], "the strategy should be refused, not the weights"
    assert lines[1].endswith("holds NaN or infinity; take an earlier checkpoint, or add --allow_nan true")
    assert f"{place}" in lines[1]


WRONG = {
    "a weight of another shape": lambda state: state["state_dict"].update({"network.lm_head.weight": torch.ones(2, 2)}),
    "a weight that is None": lambda state: state["state_dict"].update({"network.model.norm.weight": None}),
    "an optimizer of another": lambda state: state["optimizer_states"][0]["param_groups"].pop(),
    "a schedule of text": lambda state: state.update(lr_schedulers=["x"]),
    "loops of another": lambda state: state.update(loops={"fit_loop": {"x": 1}}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_state_that_cannot_be_restored_is_reported_in_one_line(kind, altered, tiny_run, tmp_path, capsys):
    path = altered(WRONG[kind])
    line = refused(["fit", *tiny_run, f"--ckpt_path={path}", f"--run_dir={tmp_path / 'out'}"], capsys)
    assert "altered.ckpt" in line


GONE = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:17541: Connection reset by peer"
"""Gloo's error on one rank after SIGKILL of the other, while both restored a checkpoint (seen with torch 2.13)."""


def test_the_end_of_another_rank_is_not_reported_as_damage(altered, tiny_run, tmp_path, capsys, monkeypatch):
    path = altered(lambda state: None)

    def gone(*_):
        raise RuntimeError(GONE)

    monkeypatch.setattr(LanguageModel, "on_load_checkpoint", gone)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *tiny_run, f"--ckpt_path={path}", f"--run_dir={tmp_path / 'out'}"])
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert f"error: another process of this run ended while {path} was restored" in shown


def test_an_error_of_lightning_about_settings_is_one_line():
    with pytest.raises(InputError, match=r"^a b$"), explain_settings():
        raise MisconfigurationException("a\n  b")
    with pytest.raises(InputError, match="`gradient_clip_algorithm` no such is invalid"), explain_settings():
        L.Trainer(accelerator="cpu", gradient_clip_algorithm="no such", logger=False)
    with pytest.raises(ValueError, match="a user's own"), explain_settings():
        raise ValueError("a user's own")
