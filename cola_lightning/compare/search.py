"""Choose further trials near the best, in a sweep and at the largest budget."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from cola_lightning.compare.rates import Rates

AXES = ("matrix", "other")
STEP = 3.0
"""Factor of a step beyond the only rate that was tried."""


def next_rates(tried: Mapping[Rates, float], beta2: Sequence[float] = ()) -> Rates:
    """Return the first neighbor of the best rates that was not tried.

    In this order: one step beyond the lowest or the highest rate that was tried, where the best has it; every other
    β2; the tried rates next to the best's; the geometric means of these and the best's, in the widest gap first. Each
    neighbor differs from the best in one setting.

    Args:
        tried: Perplexity of what was tried; infinity or NaN where training failed. Of equal ones the lower rates count
            as better.
        beta2: Values of β2 to choose from, if any.
    """
    best = best_rates(tried)
    values = {axis: sorted({getattr(rates, axis) for rates in tried}) for axis in AXES}
    return next(rates for rates in _neighbors(best, values, beta2) if rates not in tried)


def best_rates(tried: Mapping[Rates, float]) -> Rates:
    """Return the rates with the lowest perplexity; of equal ones, and if none is a number, the lower rates."""
    return min(tried, key=lambda rates: (_or_infinity(tried[rates]), rates.matrix, rates.other))


def next_finalist(tried: Mapping[Rates, float], sweep: Mapping[Rates, float], beta2: Sequence[float] = ()) -> Rates:
    """Return the rates to try next at the largest budget.

    These are, of the sweep's that differ from the best in one learning rate, those which are best in the sweep. What
    lies beyond rates that were tried and are worse is left out. Without such, they are :func:`next_rates`.

    Args:
        tried: Perplexity at the largest budget of what was tried there.
        sweep: Perplexity at the smallest budget of what was tried there.
        beta2: Values of β2 to choose from, if any.
    """
    best = best_rates(tried)
    near = {
        rates: value
        for rates, value in sweep.items()
        if any(_differ_in(axis, rates, best) for axis in AXES)
        and not any(_lies_between(each, best, rates) for each in tried)
    }
    return best_rates(near) if near else next_rates(tried, beta2)


def edges(tried: Collection[Rates], rates: Rates) -> list[str]:
    """Name those of the settings that are the lowest or the highest of several that were tried."""
    found = []
    for name in rates._fields:
        values = {getattr(each, name) for each in tried} - {None}
        if len(values) > 1 and getattr(rates, name) in (min(values), max(values)):
            found.append(name)
    return found


def _differ_in(axis: str, one: Rates, other: Rates) -> bool:
    """Say whether two settings differ in this axis and in nothing else."""
    return one != other and one == other._replace(**{axis: getattr(one, axis)})


def _lies_between(rates: Rates, start: Rates, end: Rates) -> bool:
    """Say whether rates lie on the line from ``start``, exclusive, to ``end``, which differ in one rate."""
    return rates[:2] != start[:2] and all(
        min(a, b) <= x <= max(a, b) for x, a, b in zip(rates[:2], start[:2], end[:2], strict=True)
    )


def _neighbors(best: Rates, values: Mapping[str, list[float]], beta2: Sequence[float]) -> Iterator[Rates]:
    """Yield the neighbors of the best rates, those first that tell most."""
    around = {axis: _around(values[axis], getattr(best, axis)) for axis in AXES}
    for axis in AXES:
        for rate in around[axis]:
            if rate not in values[axis]:
                yield best._replace(**{axis: rate})
    for value in beta2:
        yield best._replace(beta2=value)
    for axis in AXES:
        for rate in around[axis]:
            yield best._replace(**{axis: rate})
    gaps = [(axis, rate, rate / getattr(best, axis)) for axis in AXES for rate in around[axis]]
    for axis, rate, _ in sorted(gaps, key=lambda gap: -max(gap[2], 1 / gap[2])):
        yield best._replace(**{axis: _round(math.sqrt(rate * getattr(best, axis)))})


def _around(values: list[float], rate: float) -> tuple[float, float]:
    """Return the rates below and above one of sorted values; beyond the ends, at the distance of the outermost two."""
    place = values.index(rate)
    if len(values) == 1:
        return _round(rate / STEP), _round(rate * STEP)
    below = values[place - 1] if place else _round(rate * rate / values[1])
    above = values[place + 1] if place < len(values) - 1 else _round(rate * rate / values[-2])
    return below, above


def _round(rate: float) -> float:
    """Round to three digits, which names of folders and tables show."""
    return float(f"{rate:.3g}")


def _or_infinity(value: float) -> float:
    return value if math.isfinite(value) else math.inf
