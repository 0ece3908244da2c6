"""Optimizers on matrices that FSDP2 shards, in real processes that communicate by gloo."""

import json
from pathlib import Path

import pytest

from tests.optim.sharded_run import (
    CHECKPOINT,
    RUNS,
    SAVED,
    STEPS,
    compare_with_plain,
    refuse,
    replay_golden,
    train,
    train_each,
)
from tests.processes import Run

NAMES = list(RUNS)
FORMS = ["fsdp2", "fsdp2_sharded"]  # checkpoints in one file, and in shards


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_matrices_get_the_steps_of_plain_ones(ranks, tmp_path):
    """Every optimizer that FSDP2 admits, on shapes of which some ranks have nothing."""
    Run(compare_with_plain, ranks=ranks, folder=tmp_path).done()


@pytest.mark.distributed
def test_sharded_matrices_give_the_official_weights(tmp_path):
    """With the bounds of test_golden.py."""
    Run(replay_golden, str(tmp_path), ranks=2, folder=tmp_path).done()
    found = json.loads((tmp_path / "golden.json").read_text())
    bounds = {"galore": 1e-6, "fira": 1e-6, "apollo": 1e-6, "muon": 2e-2, "muon_float32": 1e-5}
    assert found.keys() == bounds.keys()
    assert all(found[name] <= bound for name, bound in bounds.items()), found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder of these runs: ``1``, one process; ``2``, two ranks, and ``4``, four, both of which accumulate
    two micro-batches; ``1_cola_m`` and ``4_cola_m`` the same with CoLA-M; and ``from_2_on_1`` and so on, which continue
    the runs of two ranks from their checkpoint."""
    out = tmp_path_factory.mktemp("runs")

    def run(folder: str, ranks: int, strategies: list[str], *more: object) -> None:
        arguments = NAMES, strategies, ranks, str(out / folder), *more
        Run(train_each, *arguments, ranks=ranks, folder=out / folder).done()

    run("1", 1, ["auto", "auto32"])
    run("2", 2, [*FORMS, "fsdp232"])
    run("4", 4, ["fsdp232"], None, 1)
    run("1_cola_m", 1, ["auto"], None, 8, True)
    run("4_cola_m", 4, ["fsdp2"], None, 1, True)
    for ranks in (1, 2, 4):
        run(f"from_2_on_{ranks}", ranks, FORMS, str(out / "2"))
    return out


def curve(folder: Path) -> list[list[float]]:
    """Losses, and gradient norms before clipping."""
    return json.loads((folder / "curve.json").read_text())


IN_FLOAT64 = {name: 1e-8 if name == "muon" else 1e-9 for name in NAMES}
"""Bounds of runs in float64. Muon iterates in bfloat16 there too."""
CASES = [(name, "2", form, "1/auto", IN_FLOAT64[name]) for name in NAMES for form in FORMS]
CASES += [(name, ranks, "fsdp232", "1/auto32", 1e-5) for name in NAMES for ranks in ("2", "4")]
CASES += [(name, "4_cola_m", "fsdp2", "1_cola_m/auto", IN_FLOAT64[name]) for name in NAMES]


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "ranks", "form", "alone", "bound"), CASES)
def test_fsdp2_gives_the_losses_of_one_process(runs, name, ranks, form, alone, bound):
    losses, expected = curve(runs / ranks / form / name)[0], curve(runs / alone / name)[0]
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=bound)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_continues_bit_for_bit_and_on_other_numbers_of_ranks(runs, name, form):
    """From one file and from shards, between two renewals of the projector."""
    expected = [values[SAVED:] for values in curve(runs / "2" / form / name)]
    assert curve(runs / "from_2_on_2" / form / name) == expected
    for ranks in (1, 4):
        assert curve(runs / f"from_2_on_{ranks}" / form / name)[0] == pytest.approx(expected[0], rel=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize(("first", "then", "ranks"), [("2/fsdp2", "auto", 1), ("1/auto", "fsdp2", 2)])
def test_a_file_without_states_of_parameters_goes_on_under_another_strategy(runs, tmp_path, first, then, ranks):
    resume = str(runs / first / "plain_sgd" / CHECKPOINT)
    Run(train, "plain_sgd", then, ranks, str(tmp_path), 8 // ranks, resume, ranks=ranks, folder=tmp_path).done()
    expected = [values[SAVED:] for values in curve(runs / "1" / "auto" / "plain_sgd")]
    assert curve(tmp_path)[0] == pytest.approx(expected[0], rel=1e-8)


@pytest.mark.distributed
def test_states_that_the_optimizer_does_not_keep_are_refused_in_one_line(runs, tmp_path):
    resume, line = str(runs / "2" / "fsdp2" / "sgd" / CHECKPOINT), "holds states .* but SGD .* keeps none; "
    Run(refuse, "plain_sgd", str(tmp_path), resume, line, ranks=1, folder=tmp_path).done()
