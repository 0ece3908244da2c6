"""The command ``evaluate``: closed forms for text, a task of our own for lm-eval."""

import gzip
import importlib.util
import itertools
import json
import math
import re
from functools import partial

import pytest
import torch
from torch.nn.functional import log_softmax

from cola_lightning.cli.app import main
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError, UnusableModelError
from cola_lightning.inference.evaluate import evaluate_text
from cola_lightning.inference.load import load_model_for_inference
from tests.conftest import tiny_llama

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer.train(iter(texts), 300)


def jsonl(file, texts):
    lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts).encode()
    file.write_bytes(gzip.compress(lines) if file.suffix == ".gz" else lines)
    return file


def test_a_network_that_knows_nothing_has_the_vocabulary_as_its_perplexity(tokenizer, texts, corpus):
    network = tiny_llama().double().eval()
    torch.nn.init.zeros_(network.lm_head.weight)
    result = evaluate_text(network, tokenizer, sorted(corpus.glob("*.txt")))
    ids = sum(map(len, tokenizer.encode(texts)))
    size = sum(len(text.encode()) for text in texts)
    assert result["perplexity"] == pytest.approx(300, rel=1e-5)
    assert result["loss"] == pytest.approx(math.log(300), rel=1e-6)
    assert (result["tokens"], result["documents"], result["bytes"]) == (ids - 40, 40, size)
    assert result["bits_per_byte"] == pytest.approx(math.log2(300) * ids / size, rel=1e-5)


@pytest.mark.parametrize(("length", "stride"), [(2048, 2048), (10, 10), (10, 3), (7, 1), (1, 1)])
def test_every_token_is_predicted_once_from_its_window(length, stride, tokenizer, texts, tmp_path):
    network = tiny_llama().eval()
    some = [texts[0][:60], texts[1][:35], "war", "the nation"]
    file = jsonl(tmp_path / "a.jsonl", some)
    result = evaluate_text(network, tokenizer, [file], sequence_length=length, stride=stride, batch_size=3)
    nats, count = 0.0, 0
    for ids in tokenizer.encode(some):
        begin = done = 0
        while done < len(ids) - 1:
            window = torch.tensor([ids[begin : begin + length]])
            scores = log_softmax(network(window)[0].double(), -1)
            for place in range(window.shape[1]):
                target = begin + place + 1
                if done < target < len(ids):
                    nats -= scores[place, ids[target]].item()
                    count, done = count + 1, target
            begin += stride
        assert done == len(ids) - 1
    assert result["tokens"] == count == sum(len(ids) - 1 for ids in tokenizer.encode(some))
    assert result["loss"] == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.slow
def test_kinds_of_files_and_of_models_give_the_same(trained_run, texts, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    jsonl(folder / "a.json.gz", texts[:5])
    jsonl(folder / "b.jsonl", texts[5:10])
    plain = [tmp_path / f"{index}.txt" for index in range(10)]
    for file, text in zip(plain, texts, strict=False):
        file.write_text(text)
    main(["export", str(trained_run), str(tmp_path / "model")])
    results = []
    for model, paths in ((trained_run, [folder]), (tmp_path / "model", plain)):
        main(["evaluate", str(model), "--text", *map(str, paths), f"--json={tmp_path / 'r.json'}"])
        results.append(json.loads((tmp_path / "r.json").read_text())["text"])
    assert results[0]["sequence_length"] == 32  # that of the run
    assert results[1]["sequence_length"] == 2048
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "model"), "--text", str(folder), "--sequence_length=32"])
    assert json.loads(capsys.readouterr().out)["text"] == pytest.approx(results[0])
    assert results[0]["documents"] == results[1]["documents"] == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to evaluate on; give --text FILE_OR_FOLDER, or --tasks NAME,NAME"),
        (["--text", "nowhere"], "file at 'nowhere'"),
        (
            ["--text", "{corpus}", "--sequence_length=4096"],
            "--sequence_length is 4096; this model takes from",
        ),
        (["--text", "{corpus}", "--stride=0"], "--stride is 0; it must lie between 1 and"),
        (["--text", "{corpus}", "--batch_size=0"], "--batch_size is 0"),
        (["--text", "{corpus}", "--sequence_length=0"], "--sequence_length is 0; it must be at least 1"),
        (["--tasks=which_word", "--limit=0"], "--limit is 0; it must be at least 1"),
        (["--tasks=which_word", "--include_path=gone"], "--include_path gone is no folder"),
        (["--tasks=,"], "there is nothing to evaluate on"),
        (["--text", "{corpus}", "--json={tmp}/gone/r.json"], "gone/r.json cannot be written: there is no folder"),
        (["--text", "{corpus}", "--json={tmp}"], "is a folder; name a file in it"),
        (["--text", "{empty}"], "holds no text"),
        (["--text", "{broken}"], "broken.json.gz is cut short or damaged"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, trained_run, corpus, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("  ")
    (tmp_path / "broken.json.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:40])
    places = {"corpus": corpus, "tmp": tmp_path, "empty": tmp_path / "empty.txt", "broken": tmp_path / "broken.json.gz"}
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", str(trained_run), *[text.format(**places) for text in arguments]])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer, corpus):
    with pytest.raises(InputError, match="has 300 ids, but the network only 200"):
        evaluate_text(tiny_llama(vocab_size=200), tokenizer, sorted(corpus.glob("*.txt")))


def test_without_lm_eval_it_says_how_to_get_it(trained_run, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", str(trained_run), "--tasks=lambada_openai"])
    message = "error: --tasks needs lm_eval, which is not installed; run: pip install 'cola-lightning[eval]'"
    assert message in capsys.readouterr().err


def write_task(folder):
    """Which of two words goes on with a text; answers known beforehand are told by the model's own likelihoods."""
    folder.mkdir(exist_ok=True)
    words = ["nation", "war", "treaty", "law", "sum", "peace", "land", "year"]
    texts = ["the people of", "upon the year", "great commerce", "of the nation"]
    rows = [{"text": text, "a": a, "b": b, "answer": n % 2}
            for n, text in enumerate(texts) for a, b in itertools.pairwise(words)]  # fmt: skip
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "which_word.yaml").write_text(
        f"""task: which_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{[a, b]}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
    )
    return rows


@pytest.mark.slow
@needs_lm_eval
def test_a_task_of_lm_eval_is_scored_as_our_own_network_scores_it(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import lm_eval.tasks

    rows = write_task(tmp_path / "tasks")
    trained = load_model_for_inference(trained_run)
    tokenizer, chosen = trained.tokenizer(), []
    for row in rows:
        scores = []
        prompt = tokenizer.encode([row["text"]])[0][:-1]
        for word in (row["a"], row["b"]):
            ids = tokenizer.encode([f"{row['text']} {word}"])[0][:-1]
            likelihoods = log_softmax(trained.network(torch.tensor([ids]))[0], -1)
            scores.append(sum(likelihoods[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
        chosen.append(int(scores[1] > scores[0]))
    right = sum(choice == row["answer"] for choice, row in zip(chosen, rows, strict=True))
    assert right not in (sum(row["answer"] == always for row in rows) for always in (0, 1))
    main(["evaluate", str(trained_run), "--tasks=which_word", f"--include_path={tmp_path / 'tasks'}",
          f"--json={tmp_path / 'r.json'}"])  # fmt: skip
    result = json.loads((tmp_path / "r.json").read_text())["tasks"]["which_word"]
    assert result["acc"] == pytest.approx(right / len(rows))
    quick = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # to look through all of lm-eval's takes long
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **_: quick(include_path=include_path))
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", str(trained_run), "--tasks=no_such_task_at_all"])
    assert "lm-eval knows no task no_such_task_at_all" in capsys.readouterr().err


def test_a_loss_too_large_for_a_perplexity_is_reported_alone(trained_run, corpus, tmp_path, monkeypatch, capsys):
    trained = load_model_for_inference(trained_run)
    with torch.no_grad():
        trained.network.lm_head.weight.mul_(3e4)
    monkeypatch.setattr("cola_lightning.inference.evaluate.load_model_for_inference", lambda path, trust: trained)
    main(["evaluate", str(trained_run), "--text", str(corpus / "00.txt"), f"--json={tmp_path / 'r.json'}"])
    shown = capsys.readouterr()
    result = json.loads(shown.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["text"]
    assert result["loss"] > 709
    assert result["perplexity"] is None
    assert json.loads((tmp_path / "r.json").read_text())["text"] == result
    assert re.search(r"the perplexity, exp\([\d.]+\), is beyond any number: null", shown.err)


def test_a_network_that_overflows_is_no_result(tokenizer, corpus):
    network = tiny_llama().eval()
    torch.nn.init.constant_(network.lm_head.weight, float("inf"))
    with pytest.raises(UnusableModelError, match=r"the loss is NaN after [\d,]+ tokens"):
        evaluate_text(network, tokenizer, sorted(corpus.glob("*.txt")))


@pytest.mark.parametrize("command", [["estimate"], ["benchmark"]])
def test_other_results_have_their_place_looked_at_first_too(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--json=/nowhere/r.json"])
    assert "error: --json /nowhere/r.json cannot be written: there is no folder /nowhere" in capsys.readouterr().err
