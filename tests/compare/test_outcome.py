"""Outcomes of runs whose events and checkpoints are written here."""

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from cola_lightning.compare.outcome import read_outcome
from cola_lightning.errors import InputError


@pytest.fixture
def write_run(tmp_path):
    """Return a function that writes what a run of 10 steps and 1,000 tokens leaves, which logs after the steps named.

    It makes 100 tokens per second up to its first log, and 200 after it.
    """

    def write(*logged: int, validated: tuple[int, ...] = (10,), callbacks: dict | None = None, name: str = "run"):
        folder = tmp_path / name
        with SummaryWriter(str(folder)) as events:  # Lightning counts steps from 0
            for step in logged:
                events.add_scalar("train/loss", 5.0, step - 1)
                events.add_scalar("train/tokens", 100.0 * step, step - 1)
                events.add_scalar("train/tokens_per_second", 100.0 if step == logged[0] else 200.0, step - 1)
            for step in validated:
                events.add_scalar("val/perplexity", 20.0, step - 1)
                events.add_scalar("val/perplexity_as_published", 19.0, step - 1)
        (folder / "checkpoints").mkdir()
        callbacks = {"Throughput": {"tokens": 1000}} if callbacks is None else callbacks
        state = {"global_step": 10, "state_dict": {}, "callbacks": callbacks}
        torch.save(state, folder / "checkpoints" / "last.ckpt")
        return folder

    return write


@pytest.mark.parametrize(
    ("logged", "seconds"),
    [
        ((), None),
        ((5, 10), 5 + 2.5),
        ((4, 8), (4 + 2) * 1000 / 800),  # the last 200 tokens have no speed, and count as the others
    ],
)
def test_only_the_curve_depends_on_how_often_a_run_logs(write_run, logged, seconds):
    outcome = read_outcome(write_run(*logged), 10)
    assert (outcome["perplexity"], outcome["perplexity_as_published"], outcome["tokens"]) == (20, 19, 1000)
    assert outcome["seconds"] == (None if seconds is None else pytest.approx(seconds))
    assert outcome["curve"] == [[step, 100 * step, 5] for step in logged]


def test_a_run_that_logs_nothing_after_its_trunk_has_the_trunks_curve(write_run):
    """The trunk went on to another budget after step 8, where this run began."""
    trunk = write_run(4, 8, 12, name="trunk")
    assert [point[0] for point in read_outcome(write_run(), 10, trunk, 8)["curve"]] == [4, 8]
    # One that logged before that step did not begin there.
    assert [point[0] for point in read_outcome(write_run(5, 10, name="other"), 10, trunk, 8)["curve"]] == [5, 10]


def test_a_run_without_a_result_says_why(write_run):
    with pytest.raises(InputError, match="it ends with step 10, but there was no validation"):
        read_outcome(write_run(10, validated=(), name="a"), 10)
    with pytest.raises(InputError, match="it ends with step 10, but the last validation was after step 6"):
        read_outcome(write_run(5, validated=(3, 6), name="b"), 10)
    with pytest.raises(InputError, match=r"last\.ckpt does not have the count of tokens"):
        read_outcome(write_run(10, callbacks={}, name="c"), 10)
