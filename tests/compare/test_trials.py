"""Trials, in real processes: carried out one by one, added to others, failed, and killed."""

import json
import random
import shutil
import time
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import yaml

from cola_lightning.cli.app import main
from cola_lightning.compare.rates import Rates
from cola_lightning.compare.results import TrialResults
from cola_lightning.compare.trials import SweepRunner
from cola_lightning.errors import InputError
from tests.compare.small_plans import STEP, results, write_plan

pytestmark = pytest.mark.slow


def test_a_group_that_no_document_matches_is_refused_before_anything_runs(config_file, tmp_path, capsys):
    flags = write_plan(tmp_path, config_file, held_out={"column": "url", "groups": {"novels": "//novels/"}})
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    assert "held_out group 'novels' matches no url of" in capsys.readouterr().err
    assert not results(tmp_path)


def test_single_trials_and_one_that_fails(config_file, tmp_path, capsys):
    """The second method's width does not fit its heads; the first is carried out all the same."""
    methods = {"good": {}, "bad": {"flags": {"model.num_attention_heads": 5}}}
    changes = {"methods": methods, "matrix_rates": [0.01], "seeds": [1], "budgets": [640], "held_out": None}
    flags = write_plan(tmp_path, config_file, **changes)
    with pytest.raises(SystemExit, match="2"):
        main([*flags, "--trial=2"])
    assert "trial 2 is good, best rates, seed 1; run trial 0 first" in capsys.readouterr().err
    for trial in (0, 1, 2):
        main([*flags, f"--trial={trial}"])
    assert "bad, matrix rate 0.01, other rate 0.02, seed 1: failed, see" in capsys.readouterr().out
    main([*flags, "--jobs=0"])
    text = (tmp_path / "out" / "report" / "table.md").read_text()
    assert "| – | bad | 0 of 1 | failed |" in text
    assert len(results(tmp_path / "out")) == 1
    failure = tmp_path / "out" / "bad" / "m0.01-o0.02-seed-1" / "failed.txt"
    assert "tokens-640 did not finish (exit status 2): error: " in failure.read_text()
    assert "does not divide hidden_size 32" in failure.read_text()


def test_results_do_not_depend_on_how_often_a_run_logs(config_file, tmp_path):
    """Log every 4 of 10 steps, so that the last two have no log, and every 1,000, so that none has."""
    every = {"some": 4, "none": 1000}
    methods = {name: {"flags": {"trainer.log_every_n_steps": steps}} for name, steps in every.items()}
    changes = {"methods": methods, "matrix_rates": [0.01], "seeds": [1], "budgets": [10 * STEP], "held_out": None}
    main([*write_plan(tmp_path, config_file, **changes), "--jobs=2"])
    found = {key.partition("/")[0]: result for key, result in results(tmp_path / "out").items()}
    assert {name: result["tokens"] for name, result in found.items()} == dict.fromkeys(every, 10 * 4 * 31)
    assert found["some"]["perplexity"] == found["none"]["perplexity"]
    assert {name: [point[0] for point in result["curve"]] for name, result in found.items()} == {
        "some": [4, 8], "none": [],
    }  # fmt: skip
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "| none | 0.00124 | – | – |" in text  # tokens, but no seconds


def test_a_search_and_budgets_above_the_first_are_added_without_another_grid(config_file, tmp_path):
    changes = {
        "methods": {"CoLA": {}, "later": {}}, "only": ["CoLA"], "seeds": [1], "held_out": None, "budgets": [5 * STEP],
        "beta2": [0.98],
    }  # fmt: skip
    plan = write_plan(tmp_path, config_file, **changes)
    main(plan)
    grid = results(tmp_path / "out")
    assert len(grid) == 2
    # Of the two pairs that differ in their matrix rate, the better one is at the edge of both rates. The search goes on
    # from it to the far side of the matrix rate, and from the best of the three to another.
    plan += ["--search_trials=2", "--beta2=[0.98, 0.9]"]
    main([*plan[:-1], "--trial=2"])
    with pytest.raises(SystemExit, match="2"):
        main([*plan, "--trial=4"])
    main(plan)
    swept = results(tmp_path / "out")
    assert len(swept) == 4
    assert {key: swept[key] for key in grid} == grid
    better = min(grid.values(), key=lambda result: result["perplexity"])["matrix"]
    first = {0.01: "0.005", 0.02: "0.04"}[better]
    assert f"cola/m{first}-o0.02-b0.98-seed-1/tokens-640" in swept
    betas = yaml.safe_load(next((tmp_path / "out").glob("cola/*/tokens-640/stage.yaml")).read_text())
    parts = betas["model"]["optimizer"]["init_args"]
    assert [parts[part]["init_args"]["betas"] for part in ("matrix", "other")] == [[0.9, 0.98]] * 2
    table = (tmp_path / "out" / "report" / "table.md").read_text()
    assert "| method | matrix rate | other rate | β₂ | perplexity | trials |" in table
    assert "4 of 4" in table
    assert "later" not in table
    main([*plan, f"--budgets=[{5 * STEP}, {10 * STEP}]"])
    found = results(tmp_path / "out")
    [added] = found.keys() - swept.keys()
    assert added.endswith("tokens-1280")
    assert {key: found[key] for key in swept} == swept
    assert [point[0] for point in found[added]["curve"]] == list(range(1, 11))
    # A neighbor of the best follows to the larger budget, where the better of both is the method's.
    plan += [f"--budgets=[{5 * STEP}, {10 * STEP}]", "--finalists=2"]
    main(plan)
    finals = {key: result for key, result in results(tmp_path / "out").items() if key.endswith("tokens-1280")}
    [other] = finals.keys() - {added}
    assert finals[added] == found[added]
    pairs = {(result["matrix"], result["other"]): result["perplexity"] for result in finals.values()}
    assert len(pairs) == 2
    [row] = json.loads((tmp_path / "out" / "report" / "results.json").read_text())["methods"]
    assert tuple(row["rates"][:2]) == min(pairs, key=pairs.get)
    assert {(entry["matrix"], entry["other"]): entry["perplexity"] for entry in row["finals"]} == pairs
    assert row["perplexity"][-1][0] == min(pairs.values())
    assert "## Finalists" in (tmp_path / "out" / "report" / "table.md").read_text()
    shutil.rmtree(tmp_path / "out" / other)
    with pytest.raises(SystemExit, match="2"):
        main([*plan, "--trial=6"])
    # The finalists go on beyond the four pairs of the sweep. Suppose that the last one is the best.
    plan[-1] = "--finalists=5"
    main(plan)
    [row] = json.loads((tmp_path / "out" / "report" / "results.json").read_text())["methods"]
    last = row["finals"][-1]
    assert all(last["matrix"] != entry["matrix"] or last["other"] != entry["other"] for entry in row["sweep"])
    folder = tmp_path / "out" / "cola" / f"m{last['matrix']:g}-o{last['other']:g}-b{last['beta2']:g}-seed-1"
    file = folder / "tokens-1280" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"perplexity": 1.5}))
    main([*plan, "--jobs=0"])
    [row] = json.loads((tmp_path / "out" / "report" / "results.json").read_text())["methods"]
    assert row["rates"] == [last["matrix"], last["other"], last["beta2"]]
    assert row["perplexity"][-1][0] == 1.5
    smallest = json.loads((folder / "tokens-640" / "result.json").read_text())
    assert row["at_smallest_budget"] == smallest["perplexity"]


def test_a_process_that_was_killed_is_said_to_have_been(tmp_path):
    (tmp_path / "output.log").write_text("step 3\nRuntimeError: no room\nsome advice\n")
    SweepRunner._fail(tmp_path, tmp_path, -9)
    text = (tmp_path / "failed.txt").read_text()
    assert f"{tmp_path.name} was ended by SIGKILL: RuntimeError: no room; see" in text


@pytest.mark.parametrize("status", [-2, 130], ids=["by the signal itself", "after its step"])
def test_a_process_that_was_interrupted_has_not_failed(tmp_path, status):
    """Ctrl-C reaches the runs, too. Their methods were said to have failed until the command was run again."""
    (tmp_path / "output.log").write_text("step 3\n")
    with pytest.raises(InputError, match=f"{tmp_path} was ended by Ctrl-C; run the command again to go on"):
        SweepRunner._fail(tmp_path, tmp_path, status)
    assert not (tmp_path / "failed.txt").exists()


def test_a_trunk_that_ended_early_is_said_to_have_no_checkpoint(tmp_path, monkeypatch):
    """Its exit status is 0 if a callback or a limit of time stopped it."""
    plan = SimpleNamespace(steps=lambda method, budget: 10, trunk_steps=lambda method, budget: 8)
    config = {"model": {"schedule": {"init_args": {}}}, "trainer": {}}
    monkeypatch.setattr(SweepRunner, "_fit", lambda *arguments: 0)
    runner = SweepRunner(TrialResults(plan, tmp_path), 1, main)
    assert runner._train("CoLA", Rates(0.01, 0.02), 1, 1280, config, several=True) is None
    [file] = tmp_path.rglob("failed.txt")
    assert file.read_text().startswith("trunk ended without the checkpoint of step 8; see ")


def test_the_same_plan_gives_the_same_table_also_if_it_is_killed_three_times(config_file, tmp_path):
    """Kill the comparison, and with it its runs, at random moments: when so many more files have been seen."""
    changes = {
        "methods": {"CoLA": {}}, "seeds": [1], "budgets": [50 * STEP, 100 * STEP], "held_out": None,
        "flags": {"checkpoint.every_n_train_steps": 5},
    }  # fmt: skip
    plans = {}
    for name in ("first", "second", "killed"):
        (tmp_path / name).mkdir()
        plans[name] = write_plan(tmp_path / name, config_file, **changes)
    draw, seen = random.Random(0), set()
    for _ in range(3):
        # Forked from a server that has imported everything.
        process = get_context("forkserver").Process(target=main, args=(plans["killed"],))
        process.start()
        target, until = len(seen) + draw.randint(8, 24), time.monotonic() + 240
        while len(seen) < target and process.is_alive() and time.monotonic() < until:
            seen |= {file.name + file.parent.parent.name for file in (tmp_path / "killed" / "out").rglob("*")}
            time.sleep(0.01)
        assert process.is_alive()
        process.kill()
        process.join()
        time.sleep(1)  # its runs notice that within a fifth of a second
    for plan in plans.values():
        main(plan)
    found = [results(tmp_path / name / "out") for name in plans]
    for key, result in found[0].items():
        for name in ("curve", "perplexity", "tokens"):
            assert [each[key][name] for each in found] == [result[name]] * 3
    assert len({(tmp_path / name / "out" / "report" / "table.md").read_text() for name in plans}) == 1
