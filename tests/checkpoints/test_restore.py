"""Checkpoints that are whole, and yet not enough for a run to go on from."""

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cola_lightning.checkpoints import read
from cola_lightning.checkpoints.restore import restore_explained
from cola_lightning.cli import main
from cola_lightning.errors import InputError


@pytest.fixture
def altered(trained_run, tmp_path):
    """The last checkpoint of a run, of which a function makes another."""

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
def test_a_run_does_not_go_on_without(part, altered, tiny_run, tmp_path, capsys):
    path = altered(lambda state: state.pop(part))
    line = refused(["fit", *tiny_run, f"--ckpt_path={path}", f"--run_dir={tmp_path / 'out'}"], capsys)
    assert f"altered.ckpt holds no {LACKING[part]}" in line
    assert "--weights_only_start true" in line


def test_a_new_run_begins_with_the_weights_where_a_flag_says_so(altered, tiny_run, tmp_path):
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


@pytest.mark.parametrize("verb", ["fit", "validate", "predict"])
def test_weights_that_are_no_numbers_are_refused_unless_a_flag_allows_them(verb, altered, tiny_run, tmp_path, capsys):
    path = altered(lambda state: next(iter(state["state_dict"].values())).view(-1)[:1].fill_(float("nan")))
    command = [verb, *tiny_run, f"--ckpt_path={path}", f"--run_dir={tmp_path / 'out'}"]
    assert "holds NaN or infinity; take an earlier checkpoint, or add --allow_nan true" in refused(command, capsys)
    if verb == "validate":
        main([*command, "--allow_nan=true"])


WRONG = {
    "a weight of another shape": lambda state: state["state_dict"].update({"network.lm_head.weight": torch.ones(2, 2)}),
    "a weight that is none": lambda state: state["state_dict"].update({"network.model.norm.weight": None}),
    "an optimizer of another": lambda state: state["optimizer_states"][0]["param_groups"].pop(),
    "a schedule of text": lambda state: state.update(lr_schedulers=["x"]),
    "loops of another": lambda state: state.update(loops={"fit_loop": {"x": 1}}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_restored_is_one_line(kind, altered, tiny_run, tmp_path, capsys):
    path = altered(WRONG[kind])
    line = refused(["fit", *tiny_run, f"--ckpt_path={path}", f"--run_dir={tmp_path / 'out'}"], capsys)
    assert "altered.ckpt" in line


def test_what_lightning_says_of_settings_is_one_line():
    with pytest.raises(InputError, match=r"^a b$"), restore_explained():
        raise MisconfigurationException("a\n  b")
    with pytest.raises(InputError, match="`gradient_clip_algorithm` no such is invalid"), restore_explained():
        L.Trainer(accelerator="cpu", gradient_clip_algorithm="no such", logger=False)
    with pytest.raises(ValueError, match="a user's own"), restore_explained():
        raise ValueError("a user's own")


def test_measuring_an_untrained_network_is_said(tiny_run, tmp_path):
    with pytest.warns(UserWarning, match="validate without --ckpt_path .* the network is untrained"):
        main(["validate", *tiny_run, f"--run_dir={tmp_path / 'out'}"])
