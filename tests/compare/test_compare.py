"""Small comparisons, carried out by real processes, some of which are killed."""

import csv
import json
import random
import shutil
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml

from cola_lightning.cli.app import main
from cola_lightning.cli.lightning_cli import resolve
from cola_lightning.compare.outcome import read_outcome
from cola_lightning.compare.trials import SweepRunner
from cola_lightning.errors import InputError
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

GALORE = str(REPOSITORY / "configs" / "method" / "galore.yaml")
STEP = 4 * 32
"""Tokens of an optimizer step."""


@pytest.fixture(scope="module")
def config_file(tiny_run, tmp_path_factory) -> str:
    """Return what all methods here build on: a tiny network, and a schedule with a constant part."""
    folder = tmp_path_factory.mktemp("plans")
    draw = random.Random(0)
    with (folder / "held_out.jsonl").open("w") as file:
        for number in range(12):
            words = ["law", "land", "treaty", "sum"] if number % 2 else ["peace", "war"]
            source = "laws" if number % 2 else "wars"
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=60)), "url": f"x://{source}/1"}) + "\n")
    settings = resolve([*tiny_run, f"--data.validation_paths=['{folder / 'held_out.jsonl'}']"])
    settings["model"]["schedule"] = {
        "class_path": "cola_lightning.optim.WarmupStableDecay",
        "init_args": {"warmup_steps": 2, "decay_share": 0.2, "shape": "linear", "min_ratio": 0.0},
    }
    kept = ("trainer", "checkpoint", "model", "data")
    (folder / "run.yaml").write_text(yaml.safe_dump({name: settings[name] for name in kept}))
    return str(folder / "run.yaml")


def write_plan(folder: Path, config_file: str, **changes) -> list[str]:
    plan = {
        "configs": [config_file],
        "methods": {
            "CoLA": {"flags": {"model.projection.rank": 4}},
            "GaLore, full rank": {"configs": [GALORE], "flags": {"model.projection": "FullRank"}},
        },
        "matrix_rates": [0.02, 0.01],
        "other_rates": [0.02],
        "seeds": [1, 2],
        "budgets": [5 * STEP, 10 * STEP],
        "threads": 1,
        "held_out": {"column": "url", "groups": {"of war": "//wars/", "of law": "//laws/"}},
    }
    plan = {key: value for key, value in (plan | changes).items() if value is not None}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return ["compare", f"--config={folder / 'plan.yaml'}", f"--folder={folder / 'out'}"]


def results(folder: Path) -> dict[str, dict]:
    return {str(file.parent.relative_to(folder)): json.loads(file.read_text()) for file in folder.rglob("result.json")}


@pytest.fixture(scope="module")
def compared(config_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    main([*write_plan(folder, config_file), "--jobs=2"])
    return folder


def test_every_pair_of_rates_is_tried_at_the_smallest_budget_and_the_best_trained_with_all_seeds_to_all(compared):
    found = results(compared / "out")
    for method in ("cola", "galore-full-rank"):
        sweep = {rate: found.pop(f"{method}/m{rate}-o0.02-seed-1/tokens-640") for rate in ("0.01", "0.02")}
        best = min(sweep, key=lambda rate: sweep[rate]["perplexity"])
        assert found.pop(f"{method}/m{best}-o0.02-seed-1/tokens-1280")["tokens"] == 10 * 4 * 31
        for budget in (640, 1280):
            again = found.pop(f"{method}/m{best}-o0.02-seed-2/tokens-{budget}")
            assert (again["seed"], again["matrix"], again["other"]) == (2, float(best), 0.02)
            assert [point[:2] for point in again["curve"]] == [[n, n * 124] for n in range(1, budget // STEP + 1)]
            assert again["by_source"].keys() == ({"of war", "of law"} if budget == 1280 else set())
    assert not found
    assert not list((compared / "out").rglob("*.ckpt"))
    # The text was looked at once before all runs, by a process that could have tokenized it.
    assert "train on" in (compared / "out" / "data.log").read_text()


def test_a_budget_ends_as_a_run_of_its_length_from_the_beginning(compared, tmp_path):
    """The trunk's constant part and the decay from its checkpoint are, together, the same run bit for bit."""
    run_dir = next(compared.glob("out/*/*-seed-2/tokens-1280"))
    result = json.loads((run_dir / "result.json").read_text())
    settings = yaml.safe_load((run_dir / "stage.yaml").read_text())
    settings["run_dir"] = str(tmp_path / "whole")
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(settings))
    runner = SweepRunner(None, tmp_path, 1, main)
    assert runner._fit(tmp_path / "whole", 10, settings) == 0
    whole = read_outcome(tmp_path / "whole", 10)
    assert whole["curve"] == result["curve"]
    assert whole["perplexity"] == result["perplexity"]


def test_the_report_has_what_was_counted_and_measured(compared):
    report = compared / "out" / "report"
    content = json.loads((report / "results.json").read_text())
    rows = {row["method"]: row for row in content["methods"]}
    cola, galore = rows["CoLA"], rows["GaLore, full rank"]
    d, f, layers, rank = 32, 48, 2, 4
    shared = 2 * 300 * d + 5 * d
    assert cola["parameters_m"] * 1e6 == pytest.approx(shared + layers * rank * (11 * d + 3 * f))
    assert cola["optimizer_mb"] * 1e6 == pytest.approx(8 * cola["parameters_m"] * 1e6, rel=0.01)  # two float32 moments
    assert galore["parameters_m"] * 1e6 == pytest.approx(shared + layers * (4 * d * d + 3 * d * f))
    assert galore["mflops_per_token"] > cola["mflops_per_token"] > 0
    # The cheaper method's largest budget is where both are compared.
    assert content["at"]["flops"] == pytest.approx(cola["mflops_per_token"] * 1e6 * 1280)
    assert cola["loss_at_flops"][0] == pytest.approx(cola["loss"][-1][0])
    assert galore["loss"][-1][0] < galore["loss_at_flops"][0] < galore["loss"][0][0]
    found = results(compared / "out")
    own = [result for name, result in found.items() if name.startswith("cola") and result["budget"] == 1280]
    perplexity = [result["perplexity"] for result in own]
    assert cola["perplexity"][-1] == pytest.approx([sum(perplexity) / 2, min(perplexity), max(perplexity)])
    # The baseline reaches its own loss between its budgets, where that was taken.
    assert content["at"]["loss_tokens"] == pytest.approx((620 * 1240) ** 0.5)
    assert cola["tokens_to_loss"][1] < content["at"]["loss_tokens"] < cola["tokens_to_loss"][2]
    text = (report / "report.md").read_text()
    assert "2 of 2" in text
    assert "compare --config=" in text
    assert "`model.optimizer.init_args.matrix.class_path` GaLore" in text
    assert (report / "table.md").read_text() in text
    assert len(list(csv.DictReader((report / "results.csv").open()))) == 2
    for name in ("held_out_loss", "training_loss", "sweep"):
        assert f"({name}.png)" in text
        assert (report / f"{name}.png").stat().st_size > 10_000


def test_what_has_finished_is_kept_and_the_report_is_the_same(compared, capsys):
    before = {file: file.stat().st_mtime_ns for file in (compared / "out").rglob("result.json")}
    report = compared / "out" / "report"
    kept = {name: (report / name).read_bytes() for name in ("table.md", "held_out_loss.png")}
    main(["compare", f"--config={compared / 'plan.yaml'}", f"--folder={compared / 'out'}"])
    assert capsys.readouterr().out.count("finished before") == 8
    assert before == {file: file.stat().st_mtime_ns for file in (compared / "out").rglob("result.json")}
    assert kept == {name: (report / name).read_bytes() for name in kept}


def test_a_run_that_ended_without_a_number_is_reported_and_never_best(compared, tmp_path):
    plan = [f"--config={compared / 'plan.yaml'}", f"--folder={compared / 'out'}"]
    best = json.loads((compared / "out" / "report" / "results.json").read_text())["methods"]
    best = next(row["rates"][0] for row in best if row["method"] == "CoLA")
    file = compared / "out" / "cola" / f"m{best:g}-o0.02-seed-1" / "tokens-640" / "result.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(before) | {"perplexity": float("nan")}))
        main(["compare", *plan, "--jobs=0", f"--report={tmp_path}"])
    finally:
        file.write_text(before)  # other tests look at it

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    rows = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)["methods"]
    cola = next(row for row in rows if row["method"] == "CoLA")
    assert [entry["perplexity"] for entry in cola["sweep"] if entry["matrix"] == best] == ["nan"]
    assert cola["rates"][0] != best
    assert f"| CoLA | {best:g} | 0.02 | nan |" in (tmp_path / "table.md").read_text()


def test_runs_on_text_that_changed_in_between_are_not_compared(compared):
    """The paths and settings are the same, and the files themselves are in the results."""
    result = next(iter(results(compared / "out").values()))
    [source] = result["data"]
    assert source["contents"]
    runner = SweepRunner(None, compared / "out", 1, main)
    runner._check_data(compared / "out" / "cola" / "new", result)
    with pytest.raises(InputError, match=r"cola/new was trained on other text than .*: the files changed between"):
        runner._check_data(compared / "out" / "cola" / "new", result | {"data": [source | {"contents": "other"}]})


def test_another_plan_in_the_same_folder_is_refused(compared, config_file, capsys, tmp_path):
    flags = write_plan(tmp_path, config_file, flags={"trainer.gradient_clip_val": 7})
    with pytest.raises(SystemExit, match="2"):
        main([*flags[:2], f"--folder={compared / 'out'}"])
    assert "was begun with another trainer.gradient_clip_val than the plan has now" in capsys.readouterr().err


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


def test_a_report_of_a_part_says_what_is_missing(compared, tmp_path):
    """Methods are at every stage that a comparison can be killed in."""
    copy = tmp_path / "out"
    shutil.copytree(compared / "out", copy, ignore=shutil.ignore_patterns("report"))
    content = json.loads((compared / "out" / "report" / "results.json").read_text())["methods"]
    best = {row["method"]: row["rates"][0] for row in content}
    shutil.rmtree(next(copy.glob("galore-full-rank/*-seed-2")) / "tokens-1280")
    main(["compare", f"--config={compared / 'plan.yaml'}", f"--folder={copy}", "--jobs=0"])
    text = (copy / "report" / "table.md").read_text()
    assert "| CoLA | 2 of 2 |" in text
    assert "| GaLore, full rank | 1 of 2 |" in text
    shutil.rmtree(copy / "cola")
    for budget in (640, 1280):
        shutil.rmtree(copy / "galore-full-rank" / f"m{best['GaLore, full rank']:g}-o0.02-seed-1" / f"tokens-{budget}")
    main(["compare", f"--config={compared / 'plan.yaml'}", f"--folder={copy}", "--jobs=0"])
    text = (copy / "report" / "table.md").read_text()
    assert "| – | CoLA | 0 of 2 | not run |" in text
    assert "| – | GaLore, full rank | 0 of 2 | not run |" in text
    shutil.rmtree(copy / "galore-full-rank")
    main(["compare", f"--config={compared / 'plan.yaml'}", f"--folder={copy}", "--jobs=0"])


def test_a_process_that_was_killed_is_said_to_have_been(tmp_path):
    (tmp_path / "output.log").write_text("step 3\nRuntimeError: no room\nsome advice\n")
    SweepRunner._fail(tmp_path, tmp_path, -9)
    text = (tmp_path / "failed.txt").read_text()
    assert f"{tmp_path.name} was ended by SIGKILL: RuntimeError: no room; see" in text


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
