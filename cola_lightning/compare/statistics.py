"""Compute intervals, shared ranks, loss at equal FLOPs, and tokens to equal loss."""

import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np

LEVEL, RESAMPLES, EXACT = 0.95, 10_000, 5


class Interval(NamedTuple):
    """Mean, and the ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """Return the mean of values with its percentile bootstrap interval of 95 %.

    All resamples of up to five values are enumerated, so that the interval is exact; of more, 10,000 are drawn with a
    fixed seed. The interval of three values is from the least to the greatest, because each of the 27 resamples has
    a probability of 3.7 %. It then covers the true mean in about 75 % of cases, not in 95 %.

    Raises:
        ValueError: If there is no value.
    """
    if not values:
        raise ValueError("no values")
    numbers = np.array(values, dtype=np.float64)
    if not np.isfinite(numbers).all():
        return Interval(math.inf, math.inf, math.inf)
    if len(numbers) <= EXACT:
        means = np.array(list(product(numbers, repeat=len(numbers)))).mean(axis=1)
    else:
        means = np.random.default_rng(0).choice(numbers, (RESAMPLES, len(numbers))).mean(axis=1)
    tail = (1 - LEVEL) / 2
    # This definition of the percentile makes each end the mean of some resample.
    low, high = np.quantile(means, [tail, 1 - tail], method="inverted_cdf")
    return Interval(float(numbers.mean()), float(low), float(high))


def rank_ranges(intervals: Sequence[Interval]) -> list[tuple[int, int]]:
    """Return for each interval its best and its worst possible rank, the lowest value being best.

    The best rank counts the intervals that lie wholly below, the worst those that do not lie wholly above. Two
    intervals that overlap therefore share at least one rank: of [1, 2], [1.5, 4] and [3, 5], the ranks are 1–2, 1–3
    and 2–3.
    """
    return [
        (
            1 + sum(other.high < own.low for other in intervals),
            sum(not other.low > own.high for other in intervals),
        )
        for own in intervals
    ]


Curve = Sequence[tuple[float, float]]
"""Points (x, loss) in ascending x: a budget in tokens or FLOPs, and the loss in nats that it reaches."""


def loss_at(curve: Curve, x: float) -> float | None:
    """Interpolate the loss at ``x``, between budgets; None outside of them, because nothing is extrapolated.

    The logarithm of the loss is a polynomial of that of x: a parabola through the two budgets around x and the nearest
    of the others, or a line if there are only two. A line is right for a power law, but loss has a floor. For budgets
    a factor of 2 apart and a loss of 2.5 + 2.5 x^-0.37, which falls from 5 to 4 over three budgets, a line is up to
    0.01 nats too high, and the parabola less than 0.001 off. The error of a line would favor the cheapest method,
    because it is compared at its largest budget, where nothing is interpolated.
    """
    if not curve or not curve[0][0] * (1 - 1e-9) <= x <= curve[-1][0] * (1 + 1e-9):
        return None
    if not all(math.isfinite(loss) for _, loss in curve):
        return math.inf
    logs = np.log(np.array(curve, dtype=np.float64))
    at = math.log(x)
    right = min(max(1, int(np.searchsorted(logs[:, 0], at))), len(logs) - 1)
    around = [right - 1, right] if len(logs) > 1 else [0]
    others = [n for n in range(len(logs)) if n not in around]
    points = logs[[*around, *sorted(others, key=lambda n: abs(logs[n, 0] - at))[:1]]]
    # Lagrange's form: each point's value times a polynomial that is 1 there and 0 at the others.
    total = 0.0
    for own, value in points:
        total += value * math.prod((at - other) / (own - other) for other, _ in points if other != own)
    return math.exp(total)


def x_of_loss(curve: Curve, loss: float) -> float | None:
    """Return the least ``x`` at which the curve of :func:`loss_at` reaches a loss; None if it does not."""
    if curve and curve[0][1] == loss:
        return curve[0][0]
    for (low, first), (high, last) in pairwise(curve):
        if math.isfinite(first) and first > loss >= last:
            for _ in range(60):  # bisection, in the logarithm
                between = math.sqrt(low * high)
                found = loss_at(curve, between)
                assert found is not None
                low, high = (between, high) if found > loss else (low, between)
            return high
    return None


def equal_flops(largest: Sequence[float]) -> float:
    """Return the FLOPs at which methods are compared: the most that each of them reaches at its largest budget."""
    return min(largest)


def middle(low: float, high: float) -> float:
    """Return the geometric mean of two budgets.

    The baseline's loss there is the target for ``tokens to equal loss``. With budgets of 1 and 16, methods that need
    between a quarter and four times the baseline's tokens reach it within their own budgets.
    """
    return math.sqrt(low * high)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the centered moving mean over ``window`` values, over fewer at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    half = window // 2
    starts = np.maximum(np.arange(len(values)) - half, 0)
    ends = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return list((sums[ends] - sums[starts]) / (ends - starts))
