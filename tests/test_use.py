"""Run the commands of the README's section on using a model, as they are written and in its order."""

import importlib.util
import json
import re
import shlex
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cola_lightning.cli.app import main
from tests.conftest import REPOSITORY
from tests.inference.test_evaluate import write_task

pytestmark = pytest.mark.slow

SECTION = (REPOSITORY / "README.md").read_text().split("## Use a model")[1].split("\n## ")[0]
COMMANDS = re.findall(r"^python -m cola_lightning (.*)$", SECTION, re.MULTILINE)


@pytest.fixture
def place(trained_run, texts, tmp_path, monkeypatch):
    """Make a directory with what the commands name: a run, a dense model, text, a task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(REPOSITORY / "configs", "configs")
    shutil.copytree(trained_run, "runs/quickstart", symlinks=True)
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:5]))
    write_task(tmp_path / "my_tasks")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, pad_token_id=0, **sizes)).save_pretrained("models/llama")
    shutil.copy("runs/quickstart/tokenizer/tokenizer.json", "models/llama")
    return tmp_path


def test_the_commands_of_the_readme_do_what_they_say(place, tiny_run, capsys):
    assert [command.split()[0] for command in COMMANDS] == [
        "export", "generate", "generate", "generate", "evaluate", "evaluate", "factorize", "fit",
    ]  # fmt: skip
    shown = []
    for command in COMMANDS:
        words = shlex.split(command)
        if "--tasks" in words and importlib.util.find_spec("lm_eval") is None:
            shown.append('"acc":')  # tests/inference/test_evaluate.py reports the skip
            continue
        if words[0] == "fit":  # a short one, on the tiny run's text
            words += [flag for flag in tiny_run if flag.startswith(("--trainer", "--checkpoint", "--data."))
                      and "vocab_size" not in flag]  # fmt: skip
            words += ["--trainer.callbacks=[]", "--model.schedule.warmup_steps=2"]
        main(words)
        shown.append(capsys.readouterr().out)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "modeling_cola_llama.py"} <= {
        file.name for file in (place / "models" / "quickstart").iterdir()
    }
    assert shown[1].startswith("The people of the United States")
    assert shown[2].startswith("It is the duty")
    assert "\n\nWar" in shown[2]
    assert shown[3].startswith("It is the duty")  # in int8, compiled
    assert '"bits_per_byte":' in shown[4]
    assert '"acc":' in shown[5]
    assert [line.split()[0] for line in shown[6].splitlines() if " perplexity " in line] == ["dense", "LowRank", "CoLA"]
    stored = torch.load(place / "runs" / "cola" / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["hyper_parameters"]["initial_weights"] == str(place / "models" / "cola")
    assert stored["global_step"] == 6
