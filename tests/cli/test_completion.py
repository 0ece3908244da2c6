import json
import subprocess
import sys

import jsonschema
import pytest
import yaml

from cola_lightning.cli.app import main
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

RUN_FILES = sorted(file for file in (REPOSITORY / "configs").rglob("*.yaml") if file.parent.name != "prepare")


@pytest.fixture(scope="module")
def schema():
    """Return the output of ``cola_lightning schema``, in a process without the classes that other tests define."""
    done = subprocess.run(
        [sys.executable, "-m", "cola_lightning", "schema"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_every_config_file_is_valid_by_the_schema_that_it_names(file, schema):
    first = file.read_text().splitlines()[0]
    named = (file.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve()
    assert named == REPOSITORY / "cola_lightning" / "config.schema.json"
    jsonschema.validate(yaml.safe_load(file.read_text()), schema)


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
def test_the_schema_finds_mistakes(wrong, schema):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_the_schema_describes_what_a_class_path_may_name(schema):
    classes = [entry for definition in schema["$defs"].values() for entry in definition.get("anyOf", [])]
    named = {entry.get("properties", {}).get("class_path", {}).get("const") for entry in classes}
    assert {
        "cola_lightning.methods.CoLA",
        "cola_lightning.data.C4DataModule",
        "cola_lightning.data.StreamingDataModule",
    } <= named


def test_the_command_on_the_page_writes_the_file_that_configs_name():
    command = "python -m cola_lightning schema > cola_lightning/config.schema.json"
    assert command in (REPOSITORY / "README.md").read_text()
    assert "cola_lightning/config.schema.json" in (REPOSITORY / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_scripts_know_the_options(shell, capsys):
    main(["completion", shell])
    script = capsys.readouterr().out
    for option in ("--model.num_hidden_layers", "--data", "--run_dir", "--checkpoint.every_n_train_steps"):
        assert option in script
