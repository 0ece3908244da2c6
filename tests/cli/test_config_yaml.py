"""Read YAML of configs as YAML 1.2 defines it (section 10.3.2), and within bounds of depth and size."""

import time

import pytest
import yaml

from cola_lightning.cli import config_yaml as config_yaml
from cola_lightning.cli.app import main

VALUES = {
    "1:30": "1:30",
    "190:20:30": "190:20:30",
    "1:30.5": "1:30.5",
    "-12": -12,
    "+3": 3,
    "0": 0,
    "0o17": 15,
    "0xff": 255,
    "1_000": 1000,
    "1e-3": 0.001,
    "1.5": 1.5,
    ".5": 0.5,
    "2024-01-01": "2024-01-01",
    "true": True,
    "null": None,
    "~": None,
    ".inf": float("inf"),
    "bf16-mixed": "bf16-mixed",
}


@pytest.mark.parametrize("text", VALUES)
def test_values_are_what_they_look_like(text):
    value = config_yaml.load(f"a: {text}")["a"]
    assert value == VALUES[text]
    assert type(value) is type(VALUES[text])


def test_zeros_before_a_number_do_not_make_it_octal(tiny_run, capsys):
    for flag in ("--trainer.max_steps=010", '--config="trainer: {max_steps: 010}\n"'):
        with pytest.raises(SystemExit):
            main(["fit", *tiny_run, flag.replace('"', ""), "--print_config"])
        assert "max_steps: 10\n" in capsys.readouterr().out


BAD = {
    "a: 1\nb: 2\na: 3\n": "line 3 sets a again, after line 1",
    "trainer:\n  max_steps: 1\n  max_steps: 2\n": "line 3 sets max_steps again, after line 2",
    "a: &x [*x]\n": "contains itself",
    "a: " + "[" * 60 + "]" * 60 + "\n": "line 1 is nested more than 50 deep",
    "a: " + "[" * 200_000 + "\n": "line 1 is nested more than 50 deep",
    "? [1, 2]\n: 3\n": "line 1 has a list or mapping for a key",
}
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize("text", [*BAD, BOMB])
def test_what_is_ambiguous_or_without_bound_is_refused_by_its_line(text, tmp_path, tiny_run, capsys):
    began = time.perf_counter()
    with pytest.raises(yaml.YAMLError, match=BAD.get(text, "grows to more than 100,000 values by its aliases")):
        config_yaml.load(text)
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *tiny_run, f"--config={tmp_path / 'run.yaml'}"])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert BAD.get(text, "grows to more than") in shown
    assert len(shown.strip().splitlines()) == 1
    assert time.perf_counter() - began < 10


def test_aliases_that_stay_small_are_read():
    assert config_yaml.load("a: &x {lr: 0.1}\nb: *x\n") == {"a": {"lr": 0.1}, "b": {"lr": 0.1}}


def test_files_that_name_one_another_too_often_are_refused(tmp_path, tiny_run, capsys):
    """Thirty levels of files, each of which names the next twice, would be 2^30 files."""
    for level in range(30):
        (tmp_path / f"{level}.yaml").write_text(f"config: [{level + 1}.yaml, {level + 1}.yaml]\n")
    (tmp_path / "30.yaml").write_text("trainer: {max_steps: 3}\n")
    for start in ("0.yaml", "25.yaml"):
        began = time.perf_counter()
        with pytest.raises(SystemExit):
            main(["fit", *tiny_run, f"--config={tmp_path / start}", "--print_config"])
        assert "brings along more than 50 files" in capsys.readouterr().err
        assert time.perf_counter() - began < 10


def test_a_diamond_of_files_is_read(tmp_path, tiny_run, capsys):
    (tmp_path / "base.yaml").write_text("trainer: {max_steps: 3, log_every_n_steps: 7}\n")
    (tmp_path / "left.yaml").write_text("config: base.yaml\ntrainer: {max_steps: 4}\n")
    (tmp_path / "right.yaml").write_text("config: base.yaml\ntrainer: {log_every_n_steps: 8}\n")
    (tmp_path / "run.yaml").write_text("config: [left.yaml, right.yaml]\n")
    with pytest.raises(SystemExit):
        main(["fit", *tiny_run, f"--config={tmp_path / 'run.yaml'}", "--print_config"])
    shown = capsys.readouterr().out
    assert "max_steps: 3\n" in shown  # right.yaml brings base.yaml along
    assert "log_every_n_steps: 8\n" in shown
