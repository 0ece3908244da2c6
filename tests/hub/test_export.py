"""Export a real run, and use the folder in a process that imports transformers but not this package."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from cola_lightning import load_model
from cola_lightning.cli.app import main
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.hub.card import _data
from cola_lightning.models import generate
from tests.conftest import GOLDEN

FOREIGN = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("the people of", return_tensors="pt").input_ids
made = model.generate(ids, max_new_tokens=12, do_sample=False)
model.save_pretrained(sys.argv[2])
assert "cola_lightning" not in {name.split(".")[0] for name in sys.modules}
print(type(model).__name__, made[0].tolist(), tokenizer.decode(made[0]), sep="|")
"""


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    main(["export", str(trained_run), str(folder)])
    return folder


def test_exported_weights_equal_those_of_the_checkpoint(exported, trained_run):
    stored = torch.load(trained_run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    written = load_model(exported).state_dict()
    assert written.keys() == {name.removeprefix("network.") for name in stored}
    assert all(torch.equal(written[name.removeprefix("network.")], tensor) for name, tensor in stored.items())


def test_the_card_has_the_facts_of_the_run(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for row in (
        "| method | CoLA, rank 8 |",
        "| parameters | 27,296, float32 |",
        "rows of 32 tokens |",
        "| steps | 6 |",
        "| tokens seen | 744 |",  # 6 steps of 4 rows of 31 predicted tokens
    ):
        assert row in card
    assert " per token |" in card
    assert f"torch {version('torch')}" in card  # torch.__version__ of a wheel for GPUs differs from its metadata
    assert "/tmp" not in card


@pytest.fixture
def model(request, exported, tiny_run, tmp_path):
    """Export a folder of the kind in the parameter."""
    if request.param == "a run of CoLA":
        return exported
    source, folder = str(GOLDEN), tmp_path / "exported"
    if request.param == "a run of full rank":
        source = str(tmp_path / "run")
        flags = [flag for flag in tiny_run if not flag.startswith("--model.projection.")]
        main(["fit", *flags, "--model.projection=FullRank", f"--run_dir={source}"])
    main(["export", source, str(folder), f"--tokenizer={exported}"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("a run of CoLA", "CoLALlamaForCausalLM"),
        ("a run of full rank", "LlamaForCausalLM"),
        ("the reference's CoLA", "CoLALlamaForCausalLM"),
    ],
    indirect=["model"],
)
def test_transformers_alone_generates_the_same_text_and_saves_the_same_weights(model, kind, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FOREIGN, str(model), str(tmp_path / "saved")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    name, ids, text = done.stdout.strip().split("|", 2)
    assert name == kind
    tokenizer, network = Tokenizer.load(str(model)), load_model(model)
    prompt = torch.tensor([tokenizer.encode(["the people of"])[0][:-1]])
    ours = generate(network, prompt, 12, temperature=0, stop_id=tokenizer.eos_id)
    assert ids == str(ours[0].tolist())
    assert text.startswith("the people of")
    back = load_model(tmp_path / "saved").state_dict()
    assert back.keys() == network.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in network.state_dict().items())


def test_the_references_folder_is_converted(exported, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(GOLDEN), str(tmp_path / "out")])
    assert "does not say which tokenizer it was trained with; name it by --tokenizer" in capsys.readouterr().err
    main(["export", str(GOLDEN), str(tmp_path / "out"), f"--tokenizer={exported}"])
    ids = torch.randint(320, (1, 9))
    assert torch.equal(load_model(tmp_path / "out")(ids), load_model(GOLDEN)(ids))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/gone", "{tmp}/out"], "gone does not exist; name a checkpoint"),
        (["{run}", "{run}"], "holds something already; choose another folder"),
        (["{run}", "{tmp}/out", "--merge=true"], "CoLA cannot be merged"),
        (
            ["{run}", "{tmp}/out", "--max_shard_size=big"],
            "--max_shard_size big is not a size; write it as 5GB",
        ),
        (["{run}", "{run}/config.yaml/out"], "config.yaml is a file"),
        (["{run}", "/proc/gone/out"], "/proc/gone/out cannot be made"),
        (["{run}", "{tmp}/out", "--tokenizer={tmp}"], r"holds no tokenizer.json"),
    ],
)
def test_bad_input_is_reported_in_one_line(arguments, message, trained_run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["export", *[text.format(run=trained_run, tmp=tmp_path) for text in arguments]])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize(("file", "content"), [("run.json", "{"), ("run.json", "[]"), ("config.yaml", "a: [")])
def test_unreadable_run_metadata_is_reported(file, content, trained_run, tmp_path, capsys):
    shutil.copytree(trained_run, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / file).write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert f"run/{file}" in error
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_folder(trained_run, tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cola_lightning.hub.folder.save_torch_state_dict", full)
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(trained_run), str(tmp_path / "out")])
    assert (
        "out could not be written: [Errno 28] No space left on device; nothing is left of it" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_the_card_names_data_of_the_hub_with_its_commit():
    settings = {"init_args": {"path": "allenai/c4", "name": None, "sequence_length": 256}}
    found = {"sources": [{"title": "allenai/c4/en", "commit": "1" * 40}]}
    assert _data(settings, found) == f"allenai/c4/en at commit {'1' * 40}, rows of 256 tokens"
    assert _data(settings, {}) == "allenai/c4, rows of 256 tokens"
    assert _data({"init_args": {"paths": ["/home/me/text"]}}, {"sources": [{"title": "x", "commit": None}]}) == "text"
