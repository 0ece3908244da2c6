import gc
import json
from importlib.resources import files

import jsonschema
import pytest
import yaml

from cola_lightning.cli import main
from tests.conftest import REPOSITORY

RUN_FILES = sorted(file for file in (REPOSITORY / "configs").rglob("*.yaml") if file.parent.name != "prepare")


def printed(capsys, *verb):
    with pytest.raises(SystemExit) as stop:
        main(list(verb))
    assert stop.value.code in (None, 0)
    return capsys.readouterr().out


def shipped():
    return json.loads(files("cola_lightning").joinpath("run_file.schema.json").read_text())


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_every_run_file_is_valid_by_the_schema_that_it_names(file):
    first = file.read_text().splitlines()[0]
    schema = (file.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve()
    assert schema == REPOSITORY / "cola_lightning" / "run_file.schema.json"
    jsonschema.validate(yaml.safe_load(file.read_text()), shipped())


@pytest.mark.parametrize(
    "wrong",
    [
        {"trainer": {"max_stepz": 3}},
        {"trainer": {"max_steps": "soon"}},
        {"model": {"hidden_size": 1.5}},
        {"data": {"class_path": "cola_lightning.data.TextDataModule", "init_args": {"rows": "wrapped"}}},
        {"model": {"projection": {"class_path": "cola_lightning.methods.CoLA", "init_args": {"ranks": 8}}}},
    ],
)
def test_the_schema_finds_mistakes(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, shipped())


def ours(schema):
    """The classes of this package among those that a class_path may name."""
    classes = [entry for definition in schema["$defs"].values() for entry in definition.get("anyOf", [])]
    paths = {entry.get("properties", {}).get("class_path", {}).get("const"): entry for entry in classes}
    return {path: entry for path, entry in paths.items() if path and path.startswith("cola_lightning.")}


def test_the_shipped_schema_is_that_of_the_code(capsys):
    """Compared in our own part; Lightning's and torch's differ between versions."""
    gc.collect()  # Lightning makes a class of its own for a run's optimizer, which cannot be described by its path
    made = json.loads(printed(capsys, "schema"))
    update = "run: python -m cola_lightning schema > cola_lightning/run_file.schema.json"
    for group in ("model", "run_dir", "config"):
        assert made["properties"][group] == shipped()["properties"][group], update
    assert len(ours(made)) >= 8
    assert ours(made) == ours(shipped()), update


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_scripts_know_the_options(shell, capsys):
    script = printed(capsys, "completion", shell)
    for option in ("--model.num_hidden_layers", "--data", "--run_dir", "--checkpoint.every_n_train_steps"):
        assert option in script
