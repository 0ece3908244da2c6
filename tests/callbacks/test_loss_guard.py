"""The guard in real runs, of one process and of two."""

import json
import math
import statistics
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cola_lightning.callbacks import LossGuard
from cola_lightning.callbacks.loss_guard import Spikes, TrainingDivergedError
from cola_lightning.errors import InputError
from tests.callbacks import guard_run
from tests.conftest import loader, tiny_trainer
from tests.processes import Run

pytestmark = pytest.mark.distributed

ONE = ["skip", "left_out", "accumulated", "back", "went_on_after", "lost"]
# What is left out is the same code; FSDP2 keeps and loads its states in another way.
TWO = ["ddp/skip", "ddp/left_out", "ddp/back", "ddp/went_on_after", "ddp/lost", "fsdp2/back", "fsdp2/went_on_after"]
KINDS = ["auto", "ddp"]


@cache
def folder(devices: int) -> TemporaryDirectory:
    """Where every scenario was run, on one device in this process, or by two processes that talk by gloo."""
    made = TemporaryDirectory()
    folder = Path(made.name)
    if devices == 1:
        for scenario in ONE:
            guard_run.run("auto", 1, folder / "auto" / scenario, scenario)
        return made
    Run(guard_run.run_on_two_ranks, folder, *TWO, ranks=devices, folder=folder).done()
    return made


def run_of(kind, scenario):
    return Path(folder(1 if kind == "auto" else 2).name) / kind / scenario


def result(kind, scenario):
    return json.loads((run_of(kind, scenario) / "result.json").read_text())


def events(kind, scenario):
    lines = (run_of(kind, scenario) / "events.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def skip(step, in_a_row, batch=None):
    return {
        "event": "skipped", "step": step, "batch": step - 1 if batch is None else batch, "reason": "the loss is nan",
        "in_a_row": in_a_row, "loss": "nan", "gradient_norm": "nan",
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_poisoned_step_leaves_no_trace(kind):
    poisoned, clean = result(kind, "skip"), result(kind, "left_out")
    assert poisoned["weights"] == clean["weights"]
    assert poisoned["moments"] == clean["moments"]
    assert set(poisoned["updates"]) == set(clean["updates"]) == {11}
    assert (poisoned["step"], clean["step"]) == (12, 11)
    assert events(kind, "skip") == [skip(6, 1)]
    assert not (run_of(kind, "left_out") / "events.jsonl").exists()


def test_all_micro_batches_of_a_step_are_skipped_together():
    found = result("auto", "accumulated")
    assert (found["step"], set(found["updates"])) == (6, {5})
    assert events("auto", "accumulated") == [skip(3, 1, batch=5)]


@pytest.mark.parametrize("kind", [*KINDS, "fsdp2"])
def test_after_three_in_a_row_it_goes_back_and_passes_over_them(kind):
    poisoned, clean = result(kind, "back"), result(kind, "went_on_after")
    assert poisoned["weights"] == clean["weights"]
    assert poisoned["moments"] == clean["moments"]
    for name in ("updates", "step", "schedule", "tokens"):
        assert poisoned[name] == clean[name]
    assert poisoned["step"] == poisoned["schedule"] == 12
    assert poisoned["position"] == 4 + 5 + 8
    checkpoint = run_of(kind, "back") / "checkpoints" / "step_00000004.ckpt"
    back = {"event": "rolled back", "step": 9, "batch": 9, "to_step": 4, "checkpoint": str(checkpoint), "times": 1}
    assert events(kind, "back") == [skip(7, 1), skip(8, 2), skip(9, 3), back]


@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_up_with_one_error(kind):
    lost = result(kind, "lost")
    assert "3 steps in a row were bad after 2 rollbacks" in lost["error"]
    assert str(run_of(kind, "lost") / "events.jsonl") in lost["error"]
    assert [event["event"] for event in events(kind, "lost")] == [
        *["skipped"] * 3, "rolled back", *["skipped"] * 3, "rolled back", *["skipped"] * 3, "stopped",
    ]  # fmt: skip
    assert all(math.isfinite(value) for row in lost["weights"]["network.lm_head.weight"] for value in row)


def test_events_are_in_tensorboard_and_curves_stay_finite():
    board = EventAccumulator(str(run_of("auto", "back"))).Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("events/text_summary")]
    assert len(texts) == 4
    assert texts[0].startswith("step 7 skipped (reason: the loss is nan")
    assert texts[-1].startswith("step 9 rolled back (to step: 4")
    skipped = [(event.step, event.value) for event in board.Scalars("guard/skipped_steps")]
    # The logger's step of optimizer step n is n - 1; after step 9 comes step 5 again.
    assert skipped == [
        *((step, 0) for step in range(6)), (6, 1), (7, 2), (8, 3), *((step, 3) for step in range(4, 12))
    ]  # fmt: skip
    assert [event.value for event in board.Scalars("guard/rollbacks")] == [0] * 9 + [1] * 8
    losses = {event.step: event.value for event in board.Scalars("train/loss")}
    assert len(losses) == 12
    # A step that was skipped has no loss of its own.
    assert [math.isnan(event.value) for event in board.Scalars("train/loss")] == [False] * 6 + [True] * 3 + [False] * 8


@pytest.mark.parametrize("kind", [*KINDS, "fsdp2"])
def test_the_callbacks_beside_it_see_the_same_under_every_strategy(kind):
    """Norms by group and effective ranks, of shards too; and no rank waits for another for ever."""
    here, alone = (EventAccumulator(str(run_of(each, "back"))).Reload() for each in (kind, "auto"))
    groups = [tag for tag in alone.Tags()["scalars"] if tag.startswith("gradient_norm/")]
    assert len(groups) == 5
    squares = 0.0
    for tag in groups:
        values = [event.value for event in here.Scalars(tag)]
        assert values == pytest.approx([event.value for event in alone.Scalars(tag)], rel=1e-4, nan_ok=True)
        squares += torch.tensor(values) ** 2
    whole = [event.value for event in here.Scalars("train/gradient_norm")]
    assert squares.sqrt().tolist() == pytest.approx(whole, rel=1e-5, nan_ok=True)
    assert sum(map(math.isfinite, whole)) == 14
    ranks = [tag for tag in here.Tags()["scalars"] if tag.startswith("effective_rank/")]
    assert len(ranks) == 6 * 2
    assert here.Tags()["images"] == ["spectrum"]


def test_a_spike_lies_above_the_median_by_robust_deviations():
    spikes = Spikes(window=5, deviations=3)
    for value in (2.0, 2.2, 1.9, 2.1):
        spikes.values.append(value)
        assert spikes.limit() is None
    spikes.values.append(9.0)  # moves neither the median nor the deviation by much
    values = [2.0, 2.2, 1.9, 2.1, 9.0]
    deviation = statistics.median(abs(value - 2.1) for value in values)
    assert spikes.limit() == pytest.approx(2.1 + 3 * 1.4826 * deviation)
    flat = Spikes(window=2, deviations=3)
    flat.values.extend([4.0, 4.0])
    assert flat.limit() == pytest.approx(4.0 + 3 * 0.04)
    assert Spikes(window=2, deviations=None).limit() is None


class Watch(L.Callback):
    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(pl_module.network.lm_head.weight.detach().clone())


@pytest.mark.parametrize("setting", ["loss_deviations", "gradient_norm_deviations"])
def test_a_step_that_stands_out_is_skipped(setting, tmp_path):
    others = {"loss_deviations": None, "gradient_norm_deviations": None}
    watch, guard = Watch(), LossGuard(window=6, **(others | {setting: 10.0}))
    run, model, batches = tiny_trainer(watch, guard, steps=9, default_root_dir=tmp_path)
    strange = {"input_ids": batches[0]["input_ids"], "labels": batches[0]["labels"], "weight": 50.0}
    step = model.training_step
    model.training_step = lambda batch, batch_idx: step(batch, batch_idx) * batch.get("weight", 1.0)
    run.fit(model, loader([*batches, batches[0], strange, batches[1]]))
    changed = [not torch.equal(*pair) for pair in zip(watch.weights[:-1], watch.weights[1:], strict=True)]
    assert changed == [True] * 6 + [False, True]
    (event,) = (json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines())
    assert event["step"] == 8
    assert event["reason"].startswith("the loss is" if setting == "loss_deviations" else "the gradient norm is")
    assert len(guard.spikes["loss"].values) == 6
    assert max(guard.spikes["loss"].values) < 10  # what was skipped is not among what is usual


def test_its_state_is_plain_and_goes_on(tmp_path):
    guard, other = LossGuard(window=3), LossGuard(window=3)
    run, model, batches = tiny_trainer(guard, steps=4, default_root_dir=tmp_path)
    run.fit(model, loader(batches))
    guard.in_a_row, guard.rollbacks = 2, 1
    torch.save(guard.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.state_dict() == guard.state_dict()
    assert len(other.spikes["gradient norm"].values) == 3
    assert (other.in_a_row, other.rollbacks, other.good_step) == (2, 1, 4)


def test_without_a_checkpoint_it_stops(tmp_path):
    run, model, batches = tiny_trainer(LossGuard(patience=2), steps=6, default_root_dir=tmp_path)
    step = model.training_step
    model.training_step = lambda batch, batch_idx: step(batch, batch_idx) * float("nan")
    with pytest.raises(
        TrainingDivergedError, match=r"2 steps in a row were bad, and there is no checkpoint.*every_n_train"
    ):
        run.fit(model, loader(batches))


def test_what_cannot_work_is_refused_with_the_reason():
    with pytest.raises(InputError, match="patience is 0; it must be at least 1"):
        LossGuard(patience=0)
    with pytest.raises(InputError, match="loss_deviations is -1; it must be above 0, or null"):
        LossGuard(loss_deviations=-1)
    half = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))
    with pytest.raises(InputError, match="16-mixed"):
        LossGuard().setup(half, None, "fit")


def test_under_deepspeed_a_bad_loss_ends_the_run_before_the_update(tmp_path):
    guard = LossGuard()
    guard.file = tmp_path / "events.jsonl"
    run, model, _ = tiny_trainer(guard, steps=1)
    model._trainer = run
    for loss in (2.0, float("inf")):
        guard.on_before_backward(run, model, torch.tensor(loss))
        if math.isfinite(loss):
            guard.judge(model, None, None)
        else:
            with pytest.raises(
                TrainingDivergedError, match="the loss is inf, and under DeepSpeed no step can be skipped"
            ):
                guard.judge(model, None, None)
