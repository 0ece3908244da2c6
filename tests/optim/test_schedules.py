import math
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler

from cola_lightning.errors import InputError
from cola_lightning.optim import WarmupCosine, WarmupCosineRestarts, WarmupStableDecay
from cola_lightning.optim.schedules import decay_start, make_schedule
from cola_lightning.training.module import LanguageModel


def rates(steps: int, make=WarmupCosine, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = make(optimizer, **settings)
    result = []
    for _ in range(steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return result


def test_rises_linearly_then_falls_by_a_cosine():
    lr = rates(101, total_steps=100, warmup_steps=10)
    assert lr[:11] == pytest.approx([0.2 * step for step in range(11)])
    assert lr[55] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert lr[32] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(math.pi * 22 / 90)) / 2))


def test_does_not_wrap_around_at_the_end():
    lr = rates(120, total_steps=100, warmup_steps=10)
    assert lr[99] == pytest.approx(0.2, rel=0.01)
    assert lr[100:] == pytest.approx([0.2] * 20)


def test_a_run_shorter_than_the_warm_up_ends_within_it():
    assert rates(3, total_steps=3, warmup_steps=10) == pytest.approx([0, 0.2, 0.4])


@pytest.mark.parametrize("settings", [{"warmup_steps": -1}, {"min_ratio": 1.5}])
def test_refuses_what_makes_no_sense(settings):
    with pytest.raises(InputError, match=r"it must"):
        rates(1, total_steps=10, **settings)


def test_restarts_dip_to_zero_and_rise_to_the_cosine():
    settings = {"total_steps": 100, "warmup_steps": 10}
    plain = rates(100, **settings)
    lr = rates(100, WarmupCosineRestarts, cycle_steps=25, restart_warmup_steps=4, **settings)

    def cosine(step):
        return 2 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2)

    for start in (25, 50, 75):
        assert lr[start : start + 5] == pytest.approx([share / 4 * cosine(start + 4) for share in range(5)])
        assert lr[start + 4 : start + 25] == plain[start + 4 : start + 25]
    assert lr[:25] == plain[:25]


def test_a_restart_within_the_first_rise_and_none_at_all():
    settings = {"total_steps": 40, "warmup_steps": 20, "cycle_steps": 10}
    lr = rates(14, WarmupCosineRestarts, restart_warmup_steps=2, **settings)
    assert lr[9:14] == pytest.approx([0.9, 0, 0.6, 1.2, 1.3])
    settings["cycle_steps"] = 100
    assert rates(40, WarmupCosineRestarts, restart_warmup_steps=2, **settings) == rates(
        40, total_steps=40, warmup_steps=20
    )


@pytest.mark.parametrize("settings", [{"restart_warmup_steps": 10}, {"restart_warmup_steps": -1}, {"min_ratio": 2.0}])
def test_restarts_refuse_what_makes_no_sense(settings):
    with pytest.raises(InputError, match="it must"):
        rates(1, WarmupCosineRestarts, total_steps=40, cycle_steps=10, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lr_scheduler.ReduceLROnPlateau, "ReduceLROnPlateau follows a metric; name a schedule that follows the step"),
        (partial(lr_scheduler.SequentialLR, milestones=[3]), "SequentialLR is made of schedules"),
        (lr_scheduler.ChainedScheduler, "ChainedScheduler is made of schedules"),
    ],
)
def test_what_does_not_follow_the_step_is_refused_when_the_module_is_made(make, message):
    with pytest.raises(InputError, match=message):
        LanguageModel(50, 16, 24, 1, 2, schedule=make)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=8), "ends after 8 steps, but the run has 12"),
        (partial(lr_scheduler.OneCycleLR, max_lr=1.0, epochs=2, steps_per_epoch=4), "ends after 8 steps"),
        (partial(lr_scheduler.OneCycleLR, max_lr=1.0, pct_start=2.0), "OneCycleLR could not be made: .*pct_start"),
        (partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=0), "could not be made: Expected positive integer T_0"),
        (lr_scheduler.ExponentialLR, "could not be made: .*gamma"),
    ],
)
def test_what_a_schedule_refuses_is_one_line(make, message):
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    with pytest.raises(InputError, match=message) as error:
        make_schedule(make, optimizer, 12)
    assert "\n" not in str(error.value)


def test_a_length_that_is_given_is_kept_and_null_is_the_runs():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    for given, expected in (({"T_max": 5}, 5), ({"T_max": None}, 12), ({}, 12)):
        made = make_schedule(partial(lr_scheduler.CosineAnnealingLR, **given), optimizer, 12)
        assert made.T_max == expected
    gamma = make_schedule(partial(lr_scheduler.ExponentialLR, gamma=0.9), optimizer, 12)
    assert gamma.gamma == 0.9


@pytest.mark.parametrize(
    ("shape", "decay"),
    [
        ("linear", [2, 1.5, 1, 0.5]),
        ("1-sqrt", [2, 2 * (1 - 0.5), 2 * (1 - math.sqrt(0.5)), 2 * (1 - math.sqrt(0.75))]),
    ],
)
def test_warmup_stable_decay_rises_holds_and_decays_to_zero_at_the_end(shape, decay):
    lr = rates(22, WarmupStableDecay, total_steps=20, warmup_steps=4, decay_share=0.2, shape=shape)
    assert lr[:5] == pytest.approx([0, 0.5, 1, 1.5, 2])
    assert lr[4:16] == [2.0] * 12
    assert lr[16:20] == pytest.approx(decay)
    assert lr[20:] == [0, 0]  # steps beyond the end


def test_warmup_stable_decay_ends_at_min_ratio():
    lr = rates(13, WarmupStableDecay, total_steps=10, warmup_steps=1, decay_share=0.5, shape="linear", min_ratio=0.1)
    assert lr[5:] == pytest.approx([2, 1.64, 1.28, 0.92, 0.56, 0.2, 0.2, 0.2])


def test_the_constant_part_does_not_depend_on_the_length_of_the_run():
    """Because of this, a decay may start from the checkpoint of a run that was to go on."""
    trunk = rates(40, WarmupStableDecay, total_steps=40, warmup_steps=4, decay_share=0.0)
    for total in (10, 20, 40):
        start = decay_start(total, 0.2)
        assert rates(start + 1, WarmupStableDecay, total_steps=total, warmup_steps=4) == trunk[: start + 1]
    assert [decay_start(total, 0.2) for total in (10, 20, 40)] == [8, 16, 32]


def test_the_length_of_warmup_stable_decay_is_the_runs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = make_schedule(partial(WarmupStableDecay, warmup_steps=0, decay_share=1.0, shape="linear"), optimizer, 4)
    seen = [schedule.get_last_lr()[0]]
    for _ in range(4):
        optimizer.step()
        schedule.step()
        seen.append(schedule.get_last_lr()[0])
    assert seen == [2, 1.5, 1, 0.5, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay_share": 1.5}, "decay_share is 1.5; it must lie between 0 and 1"),
        ({"warmup_steps": 33}, "warmup_steps is 33, but the decay of a run of 40 steps begins after 32"),
        ({"shape": "cosine"}, "shape is 'cosine'; it must be linear or 1-sqrt"),
        ({"min_ratio": -1}, "min_ratio is -1"),
    ],
)
def test_warmup_stable_decay_refuses_values_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        rates(1, WarmupStableDecay, **({"total_steps": 40, "warmup_steps": 4} | settings))
