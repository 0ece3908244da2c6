import itertools
import math

import numpy as np
import pytest

from cola_lightning.compare.statistics import (
    Interval,
    bootstrap_interval,
    equal_flops,
    loss_at,
    middle,
    rank_ranges,
    smooth,
    x_of_loss,
)


def test_the_interval_of_three_seeds_is_their_range():
    """Each of the 27 resamples has a probability of 1/27, above the 2.5 % of a tail."""
    found = bootstrap_interval([3.0, 1.0, 2.5])
    assert found == pytest.approx((6.5 / 3, 1.0, 3.0))


def test_the_interval_of_five_seeds_is_that_of_all_their_resamples():
    values = [1.0, 1.1, 1.3, 1.7, 2.9]
    means = sorted(sum(resample) / 5 for resample in itertools.product(values, repeat=5))
    found = bootstrap_interval(values)
    assert found.low == pytest.approx(means[math.ceil(0.025 * len(means)) - 1])
    assert found.high == pytest.approx(means[math.ceil(0.975 * len(means)) - 1])


def test_the_interval_of_many_values_is_near_the_normal_one_and_the_same_each_time():
    values = list(np.random.default_rng(1).normal(5, 1, 100))
    found = bootstrap_interval(values)
    half = 1.96 * np.std(values) / 10
    assert (found.high - found.mean, found.mean - found.low) == pytest.approx((half, half), rel=0.05)
    assert found == bootstrap_interval(values)


def test_a_run_that_ended_without_a_number_has_no_finite_interval():
    assert bootstrap_interval([1.0, math.inf, math.nan]) == (math.inf, math.inf, math.inf)
    assert bootstrap_interval([2.0]) == (2, 2, 2)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])


def test_methods_whose_intervals_overlap_share_a_rank():
    spans = [(1, 2), (1.5, 4), (3, 5), (6, 7)]
    assert rank_ranges([Interval(0, *span) for span in spans]) == [(1, 2), (1, 3), (2, 3), (4, 4)]
    draw = np.random.default_rng(0)
    for _ in range(200):
        ends = np.sort(draw.integers(0, 12, (6, 2)), axis=1)
        ranks = rank_ranges([Interval(0, *pair) for pair in ends])
        for (a, b), (x, y) in itertools.combinations(zip(ends, ranks, strict=True), 2):
            overlap = max(a[0], x[0]) <= min(a[1], x[1])
            shared = max(b[0], y[0]) <= min(b[1], y[1])
            assert shared or not overlap


def power_law(x: float) -> float:
    return 20 * x**-0.3


CURVE = [(x, power_law(x)) for x in (1e3, 4e3, 16e3)]


def test_a_loss_with_a_floor_is_interpolated_well_from_three_budgets():
    """The docstring's figures: a power law with a floor, which falls from 5 to 4 nats from 1 to 4."""

    def loss(x):
        return 2.5 + 2.5 * x**-0.3685

    curve = [(x, loss(x)) for x in (1.0, 2.0, 4.0)]
    assert curve[-1][1] == pytest.approx(4.0, abs=1e-3)
    between = np.linspace(1, 4, 50)
    assert max(abs(loss_at(curve, x) - loss(x)) for x in between) < 0.001
    assert max(loss_at([curve[1], curve[2]], x) - loss(x) for x in np.linspace(2, 4, 50)) == pytest.approx(
        0.01, abs=4e-3
    )
    for x in between:
        assert x_of_loss(curve, loss_at(curve, x)) == pytest.approx(x, rel=1e-6)


def test_the_budgets_around_are_always_among_those_that_are_interpolated():
    uneven = [(x, power_law(x)) for x in (1.0, 1.1, 1.2, 64.0)]
    assert loss_at(uneven, 3.0) == pytest.approx(power_law(3.0))
    bent = [(1.0, 5.0), (1.1, 4.9), (1.2, 4.85), (64.0, 2.0)]
    assert 2.0 < loss_at(bent, 60.0) < 2.3


def test_a_curve_with_a_run_that_diverged_has_no_loss_between():
    assert loss_at([(1, math.inf), (2, 3.0), (4, 2.0)], 3.0) == math.inf


def test_a_power_law_is_interpolated_exactly_and_never_extrapolated():
    for x in (1e3, 1.7e3, 4e3, 9e3, 16e3):
        assert loss_at(CURVE, x) == pytest.approx(power_law(x))
        assert x_of_loss(CURVE, power_law(x)) == pytest.approx(x)
    assert loss_at(CURVE, 900) is None
    assert loss_at(CURVE, 17e3) is None
    assert x_of_loss(CURVE, power_law(900)) is None
    assert x_of_loss(CURVE, power_law(17e3)) is None


def test_a_loss_that_is_reached_at_the_ends_of_a_curve_has_its_x():
    assert x_of_loss(CURVE, CURVE[0][1]) == 1e3
    assert x_of_loss(CURVE, CURVE[-1][1]) == pytest.approx(16e3)
    assert x_of_loss([(1, math.inf), (2, 3.0)], 4.0) is None
    assert loss_at([(5.0, 2.0)], 5.0) == 2.0


def test_methods_are_compared_where_all_of_them_have_budgets():
    assert equal_flops([9.6, 16.0, 12.0]) == 9.6
    assert middle(4e6, 16e6) == pytest.approx(8e6)


def test_smoothing_is_a_centered_mean_that_keeps_the_ends():
    assert smooth([1, 2, 3, 4, 50], 3) == pytest.approx([1.5, 2, 3, 19, 27])
    assert smooth([1, 5, 2], 1) == pytest.approx([1, 5, 2])
