"""Settings of optimizer and schedule when a run goes on: what is given now wins, the rest is as in an unbroken run."""

import math
import warnings
from copy import deepcopy
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from cola_lightning.callbacks import LossGuard
from cola_lightning.errors import InputError
from cola_lightning.methods import ReLoRACallback
from cola_lightning.optim import HybridOptimizer, WarmupCosine, WarmupCosineRestarts
from cola_lightning.training.rollback import restore_checkpoint
from tests.recorder import Recorder
from tests.training.test_fit_loop import WholeRun, fit


class Record(Recorder):
    """Record the settings that each optimizer step is made with."""

    def __init__(self):
        super().__init__("on_before_optimizer_step", settings=self.read)

    @staticmethod
    def read(trainer, module, optimizer):
        group = optimizer.param_groups[0]
        return {key: group[key] for key in group if key not in ("params", "foreach")}

    def curve(self, key="lr"):
        return [settings[key] for _, settings in sorted(self.by_step("settings").items())]


def run(folder, steps, optimizer, schedule, resume=None, callbacks=()):
    record = Record()
    model = {"optimizer": optimizer, "schedule": schedule}
    fit(WholeRun, folder, steps, resume, every=4, callbacks=[record, *callbacks], model=model, limit_val_batches=0)
    return record


adam = partial(AdamW, lr=0.01)
cosine = partial(WarmupCosine, warmup_steps=2)
SCHEDULES = {
    "WarmupCosine": cosine,
    "WarmupCosineRestarts": partial(WarmupCosineRestarts, warmup_steps=2, cycle_steps=5, restart_warmup_steps=2),
    "CosineAnnealingLR": lr_scheduler.CosineAnnealingLR,
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.02),
    "OneCycleLR by epochs": partial(lr_scheduler.OneCycleLR, max_lr=0.02, epochs=3, steps_per_epoch=5),
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "LinearLR": lr_scheduler.LinearLR,
    "ConstantLR": lr_scheduler.ConstantLR,
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.001, max_lr=0.01, step_size_up=3),
    "StepLR": partial(lr_scheduler.StepLR, step_size=3),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[2, 7]),
    "a function": lambda optimizer, total_steps: lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total_steps),
}
LENGTH = {"CosineAnnealingLR": "T_max", "OneCycleLR": "total_steps", "LinearLR": "total_iters",
          "ConstantLR": "total_iters", "PolynomialLR": "total_iters"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_schedule_is_the_one_of_an_unbroken_run(name, tmp_path):
    """And that is torch's own, with the length of the run where it has one."""
    unbroken = run(tmp_path, 10, adam, SCHEDULES[name])
    resumed = run(tmp_path, 10, adam, SCHEDULES[name], tmp_path / "step_00000004.ckpt")
    assert resumed.curve() == unbroken.curve()[4:]
    assert resumed.curve("betas") == unbroken.curve("betas")[4:]
    if hasattr(lr_scheduler, name):
        optimizer = adam([torch.zeros(1, requires_grad=True)])
        schedule = SCHEDULES[name](optimizer, **({LENGTH[name]: 10} if name in LENGTH else {}))
        expected = []
        for _ in range(10):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert unbroken.curve() == expected


def test_a_longer_run_has_its_own_length_from_the_first_step_on(tmp_path):
    run(tmp_path / "short", 12, adam, lr_scheduler.CosineAnnealingLR)
    resumed = run(tmp_path, 24, adam, lr_scheduler.CosineAnnealingLR, tmp_path / "short" / "step_00000008.ckpt")
    expected = [0.01 * (1 + math.cos(math.pi * step / 24)) / 2 for step in range(8, 24)]
    assert resumed.curve() == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [cosine, lr_scheduler.CosineAnnealingLR])
def test_new_settings_count_from_the_first_step_on_and_moments_go_on(schedule, tmp_path):
    run(tmp_path / "old", 12, adam, schedule)
    path = tmp_path / "old" / "step_00000004.ckpt"
    new = partial(AdamW, lr=0.002, weight_decay=10.0, betas=(0.8, 0.9))
    at_start = Recorder(
        "on_train_start", moments=lambda trainer, _: deepcopy(trainer.optimizers[0].state_dict()["state"][0])
    )
    resumed = run(tmp_path, 12, new, schedule, path, callbacks=[at_start])
    begun = run(tmp_path / "new", 12, new, schedule)  # what the new settings would have been from step 0 on
    assert resumed.curve() == begun.curve()[4:]
    assert set(resumed.curve("weight_decay")) == {10.0}
    assert set(resumed.curve("betas")) == {(0.8, 0.9)}
    (moments,) = at_start.values["moments"]
    stored = torch.load(path, weights_only=True)["optimizer_states"][0]["state"][0]
    assert moments.keys() == stored.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(moments[key], stored[key]) for key in stored)
    again = run(tmp_path, 12, new, schedule, tmp_path / "step_00000008.ckpt")
    assert again.curve() == begun.curve()[8:]


def test_a_schedule_of_another_class_goes_on_from_the_same_step(tmp_path):
    run(tmp_path, 8, adam, lr_scheduler.CosineAnnealingLR)
    for schedule in (cosine, partial(lr_scheduler.CyclicLR, base_lr=0.001, max_lr=0.01, step_size_up=3)):
        resumed = run(tmp_path / "new", 8, adam, schedule, tmp_path / "step_00000004.ckpt")
        assert resumed.curve() == run(tmp_path / "begun", 8, adam, schedule).curve()[4:]


def hybrid(matrix, other):
    return partial(HybridOptimizer, matrix=partial(matrix, lr=0.01), other=partial(other, lr=0.01))


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        (partial(SGD, lr=0.01), adam, ("SGD", "AdamW")),
        (adam, partial(Adam, lr=0.01), ("AdamW", "Adam")),
        (hybrid(AdamW, SGD), hybrid(Adam, SGD), ("AdamW, SGD", "Adam, SGD")),
        (adam, partial(AdamW, lr=0.02), None),
    ],
)
def test_another_optimizer_is_warned_of(before, now, named, tmp_path):
    run(tmp_path, 8, before, cosine)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run(tmp_path / "new", 8, now, cosine, tmp_path / "step_00000004.ckpt")
    lines = [str(each.message) for each in found if "was written under" in str(each.message)]
    expected = [f"The checkpoint was written under {named[0]}, and this run goes on with {named[1]}: "] if named else []
    assert [line.split("states that")[0] for line in lines] == expected


def test_a_missing_state_is_explained_by_the_settings(tmp_path):
    run(tmp_path, 8, adam, cosine)
    with pytest.raises(InputError, match=r"'max_exp_avg_sq'.*, or resume with the settings that it was written under"):
        run(tmp_path / "new", 8, partial(adam, amsgrad=True), cosine, tmp_path / "step_00000004.ckpt")


class Estimating(SGD):
    """Keeps state among its settings, as Prodigy does."""

    def __init__(self, params, lr, d=1.0):
        super().__init__(params, lr)
        for group in self.param_groups:
            group["d"] = d

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            group["d"] *= 2
        return loss


def test_state_that_an_optimizer_keeps_among_its_settings_goes_on(tmp_path):
    run(tmp_path, 8, partial(Estimating, lr=0.1), cosine)
    resumed = run(tmp_path, 10, partial(Estimating, lr=0.2), cosine, tmp_path / "step_00000004.ckpt")
    assert resumed.curve("d") == [2.0**step for step in range(4, 10)]
    resumed = run(tmp_path, 10, partial(Estimating, lr=0.2, d=5.0), cosine, tmp_path / "step_00000008.ckpt")
    assert resumed.curve("d") == [5.0, 10.0]


def test_going_back_behind_a_resume_keeps_the_new_settings(tmp_path):
    run(tmp_path / "old", 8, adam, cosine)
    path = tmp_path / "old" / "step_00000004.ckpt"

    class Back(L.Callback):
        done = False

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 6 and not self.done:
                self.done = True
                restore_checkpoint(trainer, path, exclude=LossGuard)

    new = partial(AdamW, lr=0.002, weight_decay=3.0)
    resumed = run(tmp_path, 8, new, cosine, path, callbacks=[Back()])
    begun = run(tmp_path / "new", 8, new, cosine)
    assert resumed.curve() == begun.curve()[4:]
    assert resumed.by_step("settings")[4]["weight_decay"] == 3.0


def test_an_option_that_needs_the_step_count_elsewhere_can_be_changed(tmp_path):
    """On the CPU there is but one place; where there is a GPU, the fused update refuses a count that is not on it."""
    run(tmp_path, 8, adam, cosine)
    resumed = run(tmp_path, 8, partial(adam, fused=True), cosine, tmp_path / "step_00000004.ckpt")
    assert set(resumed.curve("fused")) == {True}


def test_a_seed_that_is_given_wins_over_the_stored_one():
    given, silent = ReLoRACallback(2, seed=5), ReLoRACallback(2)
    for callback in (given, silent):
        callback.load_state_dict({"seed": 7})
    assert (given.seed, silent.seed) == (5, 7)


def test_patience_of_early_stopping_is_the_one_given_now(tmp_path):
    first, second = EarlyStopping("val/perplexity", patience=3), EarlyStopping("val/perplexity", patience=7)
    fit(WholeRun, tmp_path, 4, every=4, callbacks=[first])
    fit(WholeRun, tmp_path, 8, tmp_path / "last.ckpt", callbacks=[second])
    assert second.patience == 7
