"""Runs that are killed, or told to stop, around a validation have made it all the same when they have gone on."""

import os
import re
import signal

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cola_lightning.cli.app import main
from cola_lightning.training.pending_validation import NOTE
from tests.processes import Run

pytestmark = pytest.mark.distributed


class End(L.Callback):
    """Sends its own process a signal in the validation of a step, or so that it stops after the step, before that."""

    def __init__(self, number: int, step: int, validating: bool) -> None:
        self.number, self.step, self.validating = number, step, validating

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        notice = trainer.world_size  # in steps: several ranks look at each other's answer one step later
        if not self.validating and trainer.global_step + notice == self.step:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.validating and trainer.global_step == self.step and batch_idx == 0:
            os.kill(os.getpid(), self.number)


class EndAt(L.Callback):
    """Kills its own process at the start of the batch after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


TIMES = ("memory/host", "train/data_wait", "train/tokens_per_second")


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """All that does not depend on the machine."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in TIMES]
    assert {"train/loss", "train/tokens", "train/gradient_norm"} < set(tags)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


@pytest.fixture(scope="module")
def start(tiny_run):
    """Start a run of six steps that validates after every third."""

    def started(folder, *flags, ranks=1) -> Run:
        flags = [
            *tiny_run, f"--run_dir={folder}", "--ckpt_path=last", "--checkpoint.every_n_train_steps=3",
            f"--trainer.devices={ranks}", *(["--trainer.strategy=ddp"] if ranks > 1 else []), *flags,
        ]  # fmt: skip
        return Run(main, ["fit", *flags], ranks=ranks, folder=folder)

    return started


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory) -> dict[int, dict]:
    curves = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp("unbroken")
        start(folder, ranks=ranks).done()
        curves[ranks] = scalars(folder)
    assert [step for step, _ in curves[1]["val/perplexity"]] == [2, 5]
    return curves


def end(number: signal.Signals, step: int, validating: bool) -> list[str]:
    arguments = {"number": int(number), "step": step, "validating": str(validating).lower()}
    settings = [f"--trainer.callbacks.{name}={value}" for name, value in arguments.items()]
    return ["--trainer.callbacks+=tests.training.test_pending_validation.End", *settings]


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize(
    ("number", "validating", "ranks"),
    [(signal.SIGKILL, True, 1), (signal.SIGTERM, True, 1), (signal.SIGTERM, True, 2), (signal.SIGTERM, False, 1),
     (signal.SIGTERM, False, 2)],
)  # fmt: skip
def test_every_point_of_the_curves_is_there_once(start, unbroken, tmp_path, number, validating, step, ranks):
    run = start(tmp_path / "run", *end(number, step, validating), ranks=ranks)
    status = -number if number == signal.SIGKILL else 128 + number
    assert run.wait()[0] == status, run.output()
    before = scalars(tmp_path / "run").get("val/perplexity", [])
    assert [made for made, _ in before] == [2] * (step == 6)
    run = start(tmp_path / "run", ranks=ranks)
    run.done()
    assert scalars(tmp_path / "run") == unbroken[ranks]
    again = start(tmp_path / "run", ranks=ranks)
    again.done()
    assert scalars(tmp_path / "run") == unbroken[ranks]  # and not a second time


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_validation_made_after_a_stop_is_counted_once(start, tmp_path, ranks):
    """A run is stopped after step 3, before the validation of that step. The count of validation batches in the
    checkpoint of step 6 is that of one validation, as in a run that is not stopped."""
    start(tmp_path / "unbroken", ranks=ranks).done()
    run = start(tmp_path / "broken", *end(signal.SIGTERM, 3, validating=False), ranks=ranks)
    assert run.wait()[0] == 128 + signal.SIGTERM, run.output()
    start(tmp_path / "broken", ranks=ranks).done()
    counts = [batches_validated(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("unbroken", "broken")]
    assert counts[0] == counts[1]
    assert counts[0]["ready"] == counts[0]["completed"] > 0


def batches_validated(checkpoint) -> dict[str, int]:
    loops = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]
    return loops["epoch_loop.val_loop.batch_progress"]["total"]


def test_states_of_callbacks_after_a_validation_survive_a_stop_before_the_next_checkpoint(start, tmp_path):
    """The run is killed after the validation of step 3, whose checkpoint is older than that, and before another: the
    best value so far, and how long EarlyStopping has waited, are those of the run that went on."""
    flags = [
        "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/perplexity",
        "--trainer.callbacks.patience=2", "--trainer.callbacks.min_delta=1e9", "--trainer.max_steps=12",
    ]  # fmt: skip
    kill = ["--trainer.callbacks+=tests.training.test_pending_validation.EndAt", "--trainer.callbacks.step=5"]
    run = start(tmp_path, *flags, *kill)
    assert run.wait() == [-signal.SIGKILL], run.output()
    file = tmp_path / "checkpoints" / NOTE
    note = torch.load(file, weights_only=True)
    assert note["steps"] == [3]
    assert note["callbacks"][3]["HyperParameters"]["best"] == pytest.approx(scalars(tmp_path)["val/perplexity"][0][1])
    note["callbacks"][3]["HyperParameters"]["best"] = 1.0  # as if it had been better than all that come
    torch.save(note, file)
    start(tmp_path, *flags).done()
    assert [value for _, value in scalars(tmp_path)["val/perplexity_best"]][1:] == [1.0, 1.0]
    # The first validation sets EarlyStopping's best value, the two after it are no better: it stops after the third.
    assert [step for step, _ in scalars(tmp_path)["val/perplexity"]] == [2, 5, 8]


def test_sums_between_two_logged_steps_survive_a_stop(start, tmp_path):
    """A run of two ranks logs every second step and is stopped after the third. The rows differ in length, so that the
    ranks count differently, and one rank's count is not the mean of both."""
    flags = ["--trainer.log_every_n_steps=2", "--data.rows=padded", "--trainer.callbacks+=BaselinePerplexity"]
    unbroken = start(tmp_path / "unbroken", *flags, ranks=2)
    unbroken.done()
    run = start(tmp_path / "broken", *flags, *end(signal.SIGTERM, 3, validating=False), ranks=2)
    assert run.wait() == [128 + signal.SIGTERM, 0], run.output()
    assert [step for step, _ in scalars(tmp_path / "broken")["train/loss"]] == [1]
    run = start(tmp_path / "broken", *flags, ranks=2)
    run.done()
    assert scalars(tmp_path / "broken") == scalars(tmp_path / "unbroken")
    unigram = [re.findall(r"unigram +([\d,.]+)", each.output()) for each in (unbroken, run)]
    assert unigram[0] == unigram[1] != []
