"""Run every command that uses a model on every method of the README's table, and compare with transformers alone.

transformers runs in a process that does not import this package.
"""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from cola_lightning import load_model
from cola_lightning.cli.app import main
from tests.conftest import REPOSITORY
from tests.inference.test_evaluate import needs_lm_eval

pytestmark = pytest.mark.slow

OVERLAYS = sorted((REPOSITORY / "configs" / "method").glob("*.yaml"))
METHODS = ["full_rank", *(file.stem for file in OVERLAYS)]
PROMPT = "the people of"

ALONE = """
import json
import sys
import torch
from pathlib import Path
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

texts, prompt, found = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], {}
for folder in sys.argv[3:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    nats = tokens = rolling = 0.0
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            losses = cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
            logits = model(torch.tensor([ids[1:]])).logits[0, :-1]
            inside = cross_entropy(logits, torch.tensor(ids[2:]), reduction="sum")
        rolling += losses[:-1].sum().item()  # the first token is predicted from the end of the text before
        nats, tokens = nats + inside.item(), tokens + len(ids) - 2
    made = model.generate(tokenizer(prompt, return_tensors="pt").input_ids, max_new_tokens=12, do_sample=False)
    found[Path(folder).name] = {
        "class": type(model).__name__, "loss": nats / tokens, "rolling": rolling,
        "text": tokenizer.decode(made[0], skip_special_tokens=True),
    }
    model.save_pretrained(Path(folder).parent / "saved" / Path(folder).name)
assert "cola_lightning" not in {name.split(".")[0] for name in sys.modules}
print(json.dumps(found))
"""

TASK = """task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, texts):
    """Make held-out text, and a task of lm-eval that computes its likelihood."""
    folder = tmp_path_factory.mktemp("methods")
    some = [text[:150] for text in texts[:3]]
    (folder / "texts.json").write_text(json.dumps(some))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "rolling.yaml").write_text(TASK.format(data=folder / "texts.jsonl"))
    return folder


@pytest.fixture(scope="module")
def exported(place, tiny_run):
    """Train and export each method with its own config, in a network that is wide enough for its rank."""
    flags = [flag for flag in tiny_run if not flag.startswith("--model.projection")]
    flags += ["--model.hidden_size=128", "--model.intermediate_size=136", "--trainer.max_steps=3"]
    flags += ["--trainer.limit_val_batches=0", "--model.schedule.warmup_steps=1", "--checkpoint.every_n_train_steps=3"]
    for method in METHODS:
        # The configs of CoLA-M and LaX change that of CoLA.
        files = {"full_rank": [], "cola_m": ["cola", "cola_m"], "lax": ["cola", "lax"]}.get(method, [method])
        overlays = [f"--config={REPOSITORY / 'configs' / 'method' / name}.yaml" for name in files]
        main(["fit", *overlays, *flags, f"--run_dir={place / 'runs' / method}"])
        main(["export", str(place / "runs" / method), str(place / "models" / method)])
    return place / "models"


@pytest.fixture(scope="module")
def alone(place, exported):
    """Compute losses and texts of all folders with transformers, in a process without this package."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    environment |= {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-c",
        ALONE,
        str(place / "texts.json"),
        PROMPT,
        *(str(exported / name) for name in METHODS),
    ]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_each_method_of_the_readme_is_tested():
    table = (REPOSITORY / "README.md").read_text().split("## Other methods")[1].split("\n## ")[0]
    rows = [row.split("|")[2] for row in table.splitlines() if row.startswith("| ") and "configs/method" not in row]
    named = {name for row in rows for name in row.split("`")[1::2]}
    assert len(named) >= 13
    assert named | {"cola", "cola_m", "full_rank"} <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_transformers_alone_gives_the_loss_and_text_of_the_commands(method, place, exported, alone, capsys):
    here, there = str(place / "runs" / method), alone[method]
    for model in (here, str(exported / method)):
        main(["generate", model, f"--prompt={PROMPT}", "--temperature=0", "--max_new_tokens=12"])
        assert capsys.readouterr().out == there["text"] + "\n"
        main(["evaluate", model, "--text", str(place / "texts.jsonl"), "--sequence_length=2048"])
        assert json.loads(capsys.readouterr().out)["text"]["loss"] == pytest.approx(there["loss"], rel=1e-5)
    assert there["loss"] < math.log(300)  # it learnt something
    card = (exported / method / "README.md").read_text()
    assert "pre-trained with cola_lightning" in card
    assert ("trust_remote_code" in card) == (there["class"] != "LlamaForCausalLM")
    saved, network = load_model(exported.parent / "models" / "saved" / method), load_model(exported / method)
    assert all(torch.equal(saved.state_dict()[name], tensor) for name, tensor in network.state_dict().items())


@needs_lm_eval
@pytest.mark.parametrize("method", METHODS)
def test_lm_eval_gives_the_likelihood_of_transformers_alone(method, place, alone, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main(["evaluate", str(place / "runs" / method), "--tasks=rolling", f"--include_path={place / 'tasks'}",
          f"--json={place / 'result.json'}"])  # fmt: skip
    found = json.loads((place / "result.json").read_text())["tasks"]["rolling"]["byte_perplexity"]
    size = sum(len(text.encode()) for text in json.loads((place / "texts.json").read_text()))
    assert found == pytest.approx(math.exp(alone[method]["rolling"] / size), rel=1e-5)
