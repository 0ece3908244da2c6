"""A small comparison that was carried out by real processes: its results, its report, and what it refuses later."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from cola_lightning.cli.app import main
from cola_lightning.compare.outcome import read_outcome
from cola_lightning.compare.results import TrialResults
from cola_lightning.compare.trials import SweepRunner
from cola_lightning.errors import InputError
from tests.compare.small_plans import STEP, results, write_plan

pytestmark = pytest.mark.slow


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
    runner = SweepRunner(TrialResults(None, tmp_path), 1, main)
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
    runner = SweepRunner(TrialResults(None, compared / "out"), 1, main)
    runner._check_data(compared / "out" / "cola" / "new", result)
    with pytest.raises(InputError, match=r"cola/new was trained on other text than .*: the files changed between"):
        runner._check_data(compared / "out" / "cola" / "new", result | {"data": [source | {"contents": "other"}]})


def test_another_plan_in_the_same_folder_is_refused(compared, config_file, capsys, tmp_path):
    flags = write_plan(tmp_path, config_file, flags={"trainer.gradient_clip_val": 7})
    with pytest.raises(SystemExit, match="2"):
        main([*flags[:2], f"--folder={compared / 'out'}"])
    assert "was begun with another trainer.gradient_clip_val than the plan has now" in capsys.readouterr().err


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
    # One seed has no interval, so that nothing is known of its rank.
    [line] = re.findall(r"^\| – \| GaLore, full rank \| 1 of 2 \|.*", text, re.M)
    assert "(" not in line
    shutil.rmtree(copy / "cola")
    for budget in (640, 1280):
        shutil.rmtree(copy / "galore-full-rank" / f"m{best['GaLore, full rank']:g}-o0.02-seed-1" / f"tokens-{budget}")
    main(["compare", f"--config={compared / 'plan.yaml'}", f"--folder={copy}", "--jobs=0"])
    text = (copy / "report" / "table.md").read_text()
    assert "| – | CoLA | 0 of 2 | not run |" in text
    assert "| – | GaLore, full rank | 0 of 2 | not run |" in text
    shutil.rmtree(copy / "galore-full-rank")
    main(["compare", f"--config={compared / 'plan.yaml'}", f"--folder={copy}", "--jobs=0"])
