"""Run a sample of the fuzzer's cases, and the kinds of faults that it has found.

``python -m tests.hostile.fuzz`` runs as many cases as wanted.
"""

import random
import threading

import pytest
import torch

from tests.hostile.fuzz import fuzz, run
from tests.hostile.fuzz_cases import CASES, prepare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("fuzz"))


def test_randomly_altered_inputs_end_in_a_result_or_a_line(prepared):
    """Three cases of each kind run, the same ones every time."""
    found = fuzz(range(3 * len(CASES)), 1, prepared)
    wrong = {number: (kind, what) for number, (kind, what, _) in found.items() if what not in ("right", "line")}
    assert not wrong, "\n".join(f"{number}: {found[number][2][-2000:]}" for number in wrong)
    assert len(found) == 3 * len(CASES)
    assert {what for _, what, _ in found.values()} == {"right", "line"}


def spins(draw, prepared):
    while True:
        pass


def waits(draw, prepared):
    threading.Event().wait()


def names_code(draw, prepared):
    import evil_module  # noqa: F401  a module in the working directory that makes the trace

    return ["nothing"]


@pytest.mark.parametrize(("case", "what"), [(spins, "HANG"), (waits, "HANG"), (names_code, "CODE RUN")])
def test_the_harness_detects_a_hang_and_code_that_runs(prepared, case, what, monkeypatch):
    monkeypatch.setattr("tests.hostile.fuzz.SECONDS", 2)
    monkeypatch.setattr("tests.hostile.fuzz.WAITED", 2 if case is waits else 300)
    assert run(case, random.Random(0), prepared)[0] == what


ALTERED = [
    ("fit", ("loops", "fit_loop", "epoch_loop.val_loop.batch_progress", "total", "ready"), "x", "in loops sets"),
    ("validate", ("loops", "validate_loop", "batch_progress", "total", "completed"), [], "in loops sets validate_loop"),
    ("fit", ("callbacks", "HyperParameters", "best"), "x", "in the state of HyperParameters sets best to 'x'"),
    ("fit", ("callbacks", "Throughput", "tokens"), 0.5, "in the state of Throughput sets tokens to 0.5"),
    ("fit", ("callbacks", "Throughput"), 3, "sets callbacks.Throughput to 3"),
    ("fit", ("lr_schedulers", 0, "last_epoch"), 10**12, "holds a schedule that is at step 1000000000000, after 2"),
    ("fit", ("micro_batches",), 0, "sets micro_batches to 0, which should be greater than or equal to 1"),
    ("fit", ("train_loss",), ["x", 1.0], "sets train_loss.0 to 'x'"),
    ("fit", ("optimizer_settings",), {"lr": 1}, "sets optimizer_settings to"),
    ("fit", ("optimizer_states", 0, "param_groups", 0, "weight_decay"), "x", "param_groups.0 sets weight_decay to 'x'"),
    ("fit", ("optimizer_states", 0, "state", 0, "exp_avg_sq"), torch.zeros(3), "the optimizer cannot continue from"),
    ("fit", ("TextDataModule", "identity", "fixed"), None, "in TextDataModule sets identity.fixed to None"),
    ("predict", ("TextDataModule", "position"), "x", "in TextDataModule sets position to 'x'"),
]


@pytest.mark.parametrize(("command", "path", "value", "said"), ALTERED, ids=lambda value: "")
def test_a_value_of_another_type_in_a_checkpoint_is_reported_in_one_line(prepared, command, path, value, said):
    """Lightning and torch accept these values, and fail with them later, or do not end."""

    def case(draw, prepared):
        state = torch.load(prepared.run / "checkpoints" / "last.ckpt", weights_only=True)
        owner = state
        for key in path[:-1]:
            owner = owner[key]
        assert path[-1] in owner or isinstance(owner, list)
        owner[path[-1]] = value
        torch.save(state, "altered.ckpt")
        return [command, *prepared.flags, "--ckpt_path=altered.ckpt", "--run_dir=out", "--trainer.max_steps=3"]

    what, shown = run(case, random.Random(0), prepared)
    assert what == "line", shown
    [line] = [line for line in shown.splitlines() if "error: " in line]
    assert line.startswith("error: altered.ckpt ")
    assert said in line
    assert "another checkpoint" in line
