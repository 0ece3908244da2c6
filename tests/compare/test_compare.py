"""Small comparisons, carried out by real processes, one of which is killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cola_lightning.cli.app import main, resolve
from cola_lightning.compare.plan import Method, Plan
from cola_lightning.compare.trials import SweepRunner
from cola_lightning.errors import InputError
from tests.conftest import REPOSITORY

GALORE = str(REPOSITORY / "configs" / "method" / "galore.yaml")


@pytest.fixture(scope="module")
def config_file(tiny_run, tmp_path_factory) -> str:
    """What all methods here build on: six steps of a tiny network."""
    file = tmp_path_factory.mktemp("plans") / "run.yaml"
    flags = ["--model.optimizer.lr=0.01", "--trainer.val_check_interval=6"]
    settings = resolve([flag for flag in tiny_run if "val_check" not in flag] + flags)
    kept = ("trainer", "checkpoint", "model", "data")
    file.write_text(yaml.safe_dump({name: settings[name] for name in kept}))
    return str(file)


def write_plan(folder: Path, config_file: str, **changes) -> list[str]:
    plan = {
        "configs": [config_file],
        "methods": {
            "CoLA": {"flags": {"model.projection.rank": 4}},
            "GaLore, full rank": {"configs": [GALORE], "flags": {"model.projection": "FullRank"}},
        },
        "learning_rates": [1, 0.5],
        "seeds": [1, 2],
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan | changes, sort_keys=False))
    return ["compare", f"--config={folder / 'plan.yaml'}", f"--folder={folder / 'out'}"]


def results(folder: Path) -> dict[str, dict]:
    return {str(file.parent.relative_to(folder)): json.loads(file.read_text()) for file in folder.rglob("result.json")}


@pytest.fixture(scope="module")
def compared(config_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    main([*write_plan(folder, config_file), "--jobs=2"])
    return folder


@pytest.mark.slow
def test_every_method_has_the_same_trials_and_its_best_another_seed(compared):
    found = results(compared / "out")
    for method in ("cola", "galore-full-rank"):
        sweep = {factor: found[f"{method}/lr-x{factor}-seed-1"] for factor in ("0.5", "1")}
        best = min(sweep, key=lambda factor: sweep[factor]["perplexity"])
        assert found.pop(f"{method}/lr-x{best}-seed-2")["seed"] == 2
        found = {name: result for name, result in found.items() if not name.startswith(method)}
    assert not found
    results_ = results(compared / "out")
    assert results_["cola/lr-x0.5-seed-1"]["learning_rates"] == [0.005]
    assert results_["galore-full-rank/lr-x0.5-seed-1"]["learning_rates"] == [0.005]  # both of its optimizers'
    assert results_["cola/lr-x1-seed-1"]["tokens"] == 6 * 4 * 31
    assert [point[:2] for point in results_["cola/lr-x1-seed-1"]["curve"]] == [[n, n * 124] for n in range(1, 7)]
    assert not list((compared / "out").rglob("*.ckpt"))


@pytest.mark.slow
def test_the_report_has_what_was_counted_and_measured(compared):
    report = compared / "out" / "report"
    rows = {row["method"]: row for row in json.loads((report / "results.json").read_text())["methods"]}
    cola, galore = rows["CoLA"], rows["GaLore, full rank"]
    d, f, layers, rank = 32, 48, 2, 4
    shared = 2 * 300 * d + 5 * d
    assert cola["parameters_m"] * 1e6 == pytest.approx(shared + layers * rank * (11 * d + 3 * f))
    assert cola["optimizer_mb"] * 1e6 == pytest.approx(8 * cola["parameters_m"] * 1e6, rel=0.01)  # two float32 moments
    assert galore["parameters_m"] * 1e6 == pytest.approx(shared + layers * (4 * d * d + 3 * d * f))
    assert galore["mflops_per_token"] > cola["mflops_per_token"] > 0
    assert galore["tflops"] == pytest.approx(galore["mflops_per_token"] * 6 * 4 * 32 / 1e6)
    kept = [result["perplexity"] for name, result in results(compared / "out").items() if name.startswith("cola")]
    assert cola["perplexity"] == pytest.approx(sum(cola["perplexities"]) / 2)
    assert set(cola["perplexities"]) <= set(kept)
    assert min(cola["sweep"].values()) in cola["perplexities"]
    text = (report / "table.md").read_text()
    assert "Trials for each method: 2 learning rates, its own times 0.5, 1" in text
    assert "2 of 2" in text
    assert len(list(csv.DictReader((report / "results.csv").open()))) == 2
    for name in ("loss_tokens", "loss_flops", "perplexity_memory"):
        assert (report / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_what_has_finished_is_kept(compared, capsys):
    before = {file: file.stat().st_mtime_ns for file in (compared / "out").rglob("result.json")}
    main(["compare", f"--config={compared / 'plan.yaml'}", f"--folder={compared / 'out'}"])
    assert capsys.readouterr().out.count("finished before") == 6
    assert before == {file: file.stat().st_mtime_ns for file in (compared / "out").rglob("result.json")}


@pytest.mark.slow
def test_a_run_that_ended_without_a_number_is_reported_and_never_best(compared, tmp_path):
    file = compared / "out" / "cola" / "lr-x0.5-seed-1" / "result.json"
    before = file.read_text()
    plan = [f"--config={compared / 'plan.yaml'}", f"--folder={compared / 'out'}"]
    try:
        file.write_text(json.dumps(json.loads(before) | {"perplexity": float("nan")}))
        main(["compare", *plan, "--jobs=0", f"--report={tmp_path}"])
    finally:
        file.write_text(before)  # other tests look at it

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    rows = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)["methods"]
    cola = next(row for row in rows if row["method"] == "CoLA")
    assert (cola["sweep"]["0.5"], cola["factor"]) == ("nan", 1.0)
    assert "| CoLA | nan |" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_runs_on_text_that_changed_in_between_are_not_compared(compared):
    """Of the same paths and settings: the files themselves are in the results."""
    result = next(iter(results(compared / "out").values()))
    [source] = result["data"]
    assert source["contents"]
    runner = SweepRunner(None, compared / "out", 1)
    runner._check_data(compared / "out" / "cola" / "new", result)
    with pytest.raises(InputError, match=r"cola/new was trained on other text than .*: the files changed between"):
        runner._check_data(compared / "out" / "cola" / "new", result | {"data": [source | {"contents": "other"}]})


@pytest.mark.slow
def test_another_plan_in_the_same_folder_is_refused(compared, config_file, capsys, tmp_path):
    flags = write_plan(tmp_path, config_file, flags={"trainer.max_steps": 7})
    with pytest.raises(SystemExit, match="2"):
        main([*flags[:2], f"--folder={compared / 'out'}"])
    assert "was begun with another trainer.max_steps than the plan has now" in capsys.readouterr().err


@pytest.mark.slow
def test_single_trials_and_one_that_fails(config_file, tmp_path, capsys):
    """The second method's width does not fit its heads; the first is carried out all the same."""
    methods = {"good": {}, "bad": {"flags": {"model.num_attention_heads": 5}}}
    flags = write_plan(tmp_path, config_file, methods=methods, learning_rates=[1])
    with pytest.raises(SystemExit, match="2"):
        main([*flags, "--trial=2"])
    assert "trial 2 is good at its best learning rate; run trial 0 first" in capsys.readouterr().err
    for trial in (0, 1, 2):
        main([*flags, f"--trial={trial}"])
    assert "bad, learning rate x 1, seed 1: failed, see" in capsys.readouterr().out
    main([*flags, "--jobs=0"])
    text = (tmp_path / "out" / "report" / "table.md").read_text()
    assert "| bad | failed |" in text
    assert len(results(tmp_path / "out")) == 2
    assert "does not divide hidden_size 32" in (tmp_path / "out" / "bad" / "lr-x1-seed-1" / "failed.txt").read_text()


@pytest.mark.slow
def test_killed_for_real_it_goes_on_from_its_checkpoint(config_file, tmp_path):
    steps = {"trainer.max_steps": 150, "trainer.val_check_interval": 150, "checkpoint.every_n_train_steps": 5}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    plans = {
        name: write_plan(tmp_path / name, config_file, methods={"CoLA": {}}, learning_rates=[1], seeds=[1], flags=steps)
        for name in ("whole", "broken")
    }
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "broken" / "out" / "cola" / "lr-x1-seed-1"
    last = folder / "checkpoints" / "last.ckpt"
    with subprocess.Popen([sys.executable, "-m", "cola_lightning", *plans["broken"]], env=environment) as process:
        until = time.monotonic() + 240
        while not last.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    time.sleep(5)
    reached = os.readlink(last)
    time.sleep(2)
    assert reached == os.readlink(last) < "step_00000150.ckpt"  # the run ended with its parent
    assert not results(tmp_path / "broken")
    for plan in plans.values():
        main(plan)
    assert reached in (folder / "output.log").read_text()
    whole, broken = (next(iter(results(tmp_path / name).values())) for name in ("whole", "broken"))
    assert broken["curve"] == whole["curve"]
    assert broken["perplexity"] == whole["perplexity"]


def make(**changes) -> Plan:
    arguments = {"configs": [], "flags": {}, "methods": {"a": Method(), "b": Method()}, "learning_rates": [3, 1],
                 "seeds": [1, 2, 3], "resolve": lambda flags: {}}  # fmt: skip
    return Plan(**(arguments | changes))


def test_trials_are_numbered_sweep_first():
    trials = [(trial.number, trial.method, trial.factor, trial.seed) for trial in make().trials]
    assert trials == [
        (0, "a", 1, 1), (1, "a", 3, 1), (2, "b", 1, 1), (3, "b", 3, 1),
        (4, "a", None, 2), (5, "a", None, 3), (6, "b", None, 2), (7, "b", None, 3),
    ]  # fmt: skip


def test_learning_rates_are_scaled_at_every_place_of_a_config():
    optimizer = {"init_args": {"matrices": {"init_args": {"lr": 0.02, "rank": 4}}, "rest": {"init_args": {"lr": 0.01}}}}
    plan = make(resolve=lambda flags: {"model": {"optimizer": optimizer}})
    made = plan.configuration("a", 0.5, 7, Path("x"))
    parts = made["model"]["optimizer"]["init_args"]
    assert parts == {"matrices": {"init_args": {"lr": 0.01, "rank": 4}}, "rest": {"init_args": {"lr": 0.005}}}
    assert (made["seed_everything"], made["run_dir"]) == (7, "x")
    assert plan.configuration("a", 1, 7, Path("x"))["model"]["optimizer"] == optimizer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, r"methods is \[\]; it must name at least one"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]; it must name at least one, and none twice"),
        ({"learning_rates": [0, 1]}, "each must be above 0"),
        ({"methods": {"A b": Method(), "a-B": Method()}}, "would share a folder"),
        ({"configs": ["gone.yaml"]}, "gone.yaml does not exist"),
    ],
)
def test_bad_plans_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)
