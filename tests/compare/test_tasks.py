"""Tasks of lm-eval in a comparison and during training, and the minimal pairs that are made for them."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cola_lightning.callbacks import EvaluateTasks
from cola_lightning.cli.app import main
from cola_lightning.compare.tasks import Score, mean_scores
from cola_lightning.errors import InputError
from cola_lightning.inference.evaluate import evaluate_tasks
from cola_lightning.inference.load import load_model_for_inference
from tests.compare.small_plans import write_plan
from tests.conftest import REPOSITORY
from tests.inference.test_evaluate import needs_lm_eval, write_task

SCRIPT = REPOSITORY / "recipes" / "compare_methods" / "minimal_pairs.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("minimal_pairs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# -- minimal pairs ----------------------------------------------------------------------------------------------------

TEXT = [
    "Then she was in the garden with her brother. They were late for the feast. 12 Short one.\nA king has come home."
]


def test_a_pair_differs_in_one_fault(script):
    draw, words = random.Random(0), ["Then", "she", "was", "in", "the", "garden"]
    assert script.break_agreement(words, draw, []) == ["Then", "she", "were", "in", "the", "garden"]
    assert script.break_agreement(["The", "man", "was", "in", "the", "garden"], draw, []) is None
    assert script.swap_word(words, draw, ["feast"]) is None  # first and last word stay, the others are short
    for _ in range(20):
        exchanged = script.exchange_neighbors([*words, "today"], draw, [])
        assert exchanged != [*words, "today"]
        assert sorted(exchanged) == sorted([*words, "today"])
        assert (exchanged[0], exchanged[-1]) == ("Then", "today")
        swapped = script.swap_word([*words, "today"], draw, ["feast", "garden"])
        assert swapped in (None, ["Then", "she", "was", "in", "the", "feast", "today"])


def test_sentences_have_a_usual_length_and_stand_once(script):
    assert script.sentences_of(TEXT * 2) == [
        "Then she was in the garden with her brother.",
        "They were late for the feast.",
    ]


def test_the_same_seed_makes_the_same_task(script, tmp_path, capsys):
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": TEXT[0]}) + "\n")
    made = []
    for folder in ("a", "b"):
        script.main(["--text", str(tmp_path / "held_out.jsonl"), "--folder", str(tmp_path / folder), "--seed=3"])
        made.append([file.read_text() for file in sorted((tmp_path / folder).glob("*.jsonl"))])
    assert made[0] == made[1]
    pairs = [json.loads(line) for line in (tmp_path / "a" / "minimal_pairs_agreement.jsonl").read_text().splitlines()]
    assert {pair["good"]: pair["bad"] for pair in pairs} == {
        "Then she was in the garden with her brother.": "Then she were in the garden with her brother.",
        "They were late for the feast.": "They was late for the feast.",
    }
    assert "minimal_pairs_agreement: 2 pairs" in capsys.readouterr().out
    task = yaml.safe_load((tmp_path / "a" / "minimal_pairs_agreement.yaml").read_text())
    assert Path(task["dataset_kwargs"]["data_files"]["test"]).is_file()


@pytest.mark.slow
@needs_lm_eval
def test_pairs_are_scored_by_the_likelihoods_of_both_sentences(script, trained_run, tmp_path, offline):
    words = ["the", "people", "of", "this", "great", "nation", "made", "peace", "and", "law", "upon", "land", "in"]
    draw = random.Random(1)
    sentences = [" ".join(["Then", *draw.sample(words, 8)]) + "." for _ in range(40)]
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": " ".join(sentences)}) + "\n")
    script.main(["--text", str(tmp_path / "held_out.jsonl"), "--folder", str(tmp_path / "tasks")])
    trained = load_model_for_inference(trained_run)
    tokenizer = trained.tokenizer()

    def likelihood(sentence: str) -> float:
        # lm-eval puts the end-of-document id before a text without context, and a space before the answer.
        ids = [tokenizer.eos_id, *tokenizer.encode([f" {sentence}"])[0][:-1]]
        logits = trained.network(torch.tensor([ids]))[0].float().log_softmax(-1)
        return sum(logits[n, ids[n + 1]].item() for n in range(len(ids) - 1))

    file = tmp_path / "tasks" / "minimal_pairs_word_order.jsonl"
    pairs = [json.loads(line) for line in file.read_text().splitlines()]
    right = sum(likelihood(pair["good"]) > likelihood(pair["bad"]) for pair in pairs)
    found = evaluate_tasks(trained, tokenizer, ["minimal_pairs_word_order"], str(tmp_path / "tasks"))
    assert 0 < right < len(pairs)
    assert found["minimal_pairs_word_order"]["acc"] == pytest.approx(right / len(pairs))


# -- scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_means_over_seeds_and_errors_do_not_shrink_with_them():
    runs = [
        {"arc": {"acc": 0.2, "acc_stderr": 0.01, "sum": 3, "sample_len": 9}},
        {"arc": {"acc": 0.4, "acc_stderr": 0.03, "sum": 5, "sample_len": 9}},
    ]
    assert mean_scores(runs) == {"arc acc": Score(pytest.approx(0.3), pytest.approx(0.02)), "arc sum": Score(4, None)}
    assert mean_scores([{"arc": {"acc": 0.2}}, {}]) == {}
    assert mean_scores([]) == {}


@pytest.mark.slow
@needs_lm_eval
def test_tasks_of_a_plan_are_in_the_table(config_file, tmp_path, offline):
    write_task(tmp_path / "tasks")
    changes = {
        "methods": {"CoLA": {}}, "matrix_rates": [0.01], "seeds": [1, 2], "budgets": [5 * 128], "held_out": None,
        "tasks": ["which_word"], "include_path": str(tmp_path / "tasks"),
    }  # fmt: skip
    plan = write_plan(tmp_path, config_file, **changes)
    main([*plan, "--keep_checkpoints=true"])
    [row] = json.loads((tmp_path / "out" / "report" / "results.json").read_text())["methods"]
    own = []
    for run_dir in sorted((tmp_path / "out" / "cola").glob("*/tokens-640")):
        trained = load_model_for_inference(run_dir)
        own.append(evaluate_tasks(trained, trained.tokenizer(), ["which_word"], str(tmp_path / "tasks"))["which_word"])
    mean, error = row["tasks"]["which_word acc"]
    assert mean == pytest.approx(sum(scores["acc"] for scores in own) / 2)
    assert error == pytest.approx(sum(scores["acc_stderr"] for scores in own) / 2)
    assert f"| CoLA | {mean:.4f} ± {error:.4f} |" in (tmp_path / "out" / "report" / "table.md").read_text()


@needs_lm_eval
def test_a_task_that_nobody_knows_is_refused_before_anything_runs(config_file, tmp_path, capsys, offline):
    write_task(tmp_path / "tasks")
    plan = write_plan(tmp_path, config_file, held_out=None, tasks=["no_task"], include_path=str(tmp_path / "gone"))
    with pytest.raises(SystemExit, match="2"):
        main(plan)
    assert "include_path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- during training --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_lm_eval
def test_tasks_are_scored_at_each_validation_and_do_not_change_the_run(tiny_run, trained_run, tmp_path, offline):
    """lm-eval seeds all generators; the run with it must be the run without it, bit for bit."""
    write_task(tmp_path / "tasks")
    settings = {"tasks": ["which_word"], "include_path": str(tmp_path / "tasks")}
    callback = {"class_path": "EvaluateTasks", "init_args": settings}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    main(["fit", *tiny_run, f"--config={tmp_path / 'tasks.yaml'}", f"--run_dir={tmp_path / 'run'}"])
    found = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("tasks/which_word/acc")
    assert len(found) == 2  # after steps 3 and 6
    trained = load_model_for_inference(tmp_path / "run")
    scores = evaluate_tasks(trained, trained.tokenizer(), ["which_word"], str(tmp_path / "tasks"))
    assert found[-1].value == pytest.approx(scores["which_word"]["acc"])
    without = load_model_for_inference(trained_run).network.state_dict()
    for name, weight in trained.network.state_dict().items():
        assert torch.equal(weight, without[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": ["a"], "limit": 0}, "limit is 0"),
        ({"tasks": ["a"], "batch_size": 0}, "batch_size is 0"),
        ({"tasks": ["a"], "include_path": "/nowhere"}, "include_path /nowhere is no folder"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        EvaluateTasks(**settings)
