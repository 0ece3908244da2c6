"""The search for better rates around a grid, on functions whose minimum is known; and the order of all trials."""

import math
from types import SimpleNamespace

import pytest

from cola_lightning.compare.plan import Method, Plan
from cola_lightning.compare.rates import Rates
from cola_lightning.compare.search import best_rates, edges, next_rates
from cola_lightning.compare.sweep import run_all

GRID = [Rates(matrix, other, 0.98) for matrix in (0.001, 0.003) for other in (0.01, 0.03)]


def bowl(matrix: float, other: float, beta2: float | None = None):
    """Return a function with its minimum of 1 at these rates. A factor of 3 in one rate makes it 2."""

    def perplexity(rates: Rates) -> float:
        away = [math.log(rates.matrix / matrix, 3), math.log(rates.other / other, 3)]
        return 1 + sum(x * x for x in away) + 0.5 * (rates.beta2 != beta2)

    return perplexity


def search(function, grid=GRID, trials: int = 8, beta2=(0.98, 0.999)) -> dict[Rates, float]:
    tried = {rates: function(rates) for rates in grid}
    for _ in range(trials):
        rates = next_rates(tried, beta2)
        assert rates not in tried
        tried[rates] = function(rates)
    assert len(tried) == len(grid) + trials
    return tried


@pytest.mark.parametrize("matrix", [0.0001, 0.0003, 0.001, 0.03])
@pytest.mark.parametrize("other", [0.003, 0.03, 0.09])
@pytest.mark.parametrize("beta2", [0.98, 0.999])
def test_the_best_outside_the_grid_is_found_within_half_a_step(matrix, other, beta2):
    best = best_rates(search(bowl(matrix, other, beta2)))
    assert best.beta2 == beta2
    assert max(best.matrix / matrix, matrix / best.matrix) < 3**0.51
    assert max(best.other / other, other / best.other) < 3**0.51


def test_neighbors_are_tried_in_the_order_that_is_documented():
    def first(number: int, function, grid=GRID) -> list[tuple]:
        return [tuple(rates) for rates in search(function, grid, number)][len(grid) :]

    # The best of the grid is its lowest matrix rate and its highest other rate: beyond both, then the other β2.
    assert first(3, bowl(0.001, 0.03, 0.98)) == [(0.000333, 0.03, 0.98), (0.001, 0.09, 0.98), (0.001, 0.03, 0.999)]
    # All around it is tried now; then the means of neighbors, the lower first.
    assert first(5, bowl(0.001, 0.03, 0.98))[3:] == [(0.000577, 0.03, 0.98), (0.00173, 0.03, 0.98)]
    # One pair alone, from which a step is a factor of 3.
    alone = first(4, bowl(0.01, 0.1, 0.98), [Rates(0.01, 0.1, 0.98)])
    assert alone == [(0.00333, 0.1, 0.98), (0.03, 0.1, 0.98), (0.01, 0.0333, 0.98), (0.01, 0.3, 0.98)]


def test_a_better_rate_beyond_the_edge_is_followed():
    tried = search(bowl(0.00004, 0.01, 0.98), trials=4)
    assert [rates.matrix for rates in tried][4:] == [0.000333, 0.000111, 0.000037, 0.0000123]


def test_runs_that_failed_count_as_tried_and_never_as_best():
    tried = dict.fromkeys(GRID, math.nan) | {GRID[2]: math.inf}
    assert best_rates(tried) == GRID[0]  # the lowest rates are the most likely to work
    assert next_rates(tried) == Rates(0.000333, 0.01, 0.98)
    assert best_rates(tried | {GRID[3]: 900.0}) == GRID[3]


def test_edges_are_the_outermost_of_several_values_that_were_tried():
    tried = dict.fromkeys([Rates(m, o, b) for m in (1, 2, 3) for o in (1, 2, 3) for b in (0.9, 0.95, 0.98)], 0.0)
    assert edges(tried, Rates(2, 2, 0.95)) == []
    assert edges(tried, Rates(2, 3, 0.95)) == ["other"]
    assert edges(tried, Rates(1, 3, 0.98)) == ["matrix", "other", "beta2"]
    assert edges({Rates(1, 1): 2.0}, Rates(1, 1)) == []
    assert edges({Rates(1, 1): 2.0, Rates(2, 1): 3.0}, Rates(2, 1)) == ["matrix"]


@pytest.mark.parametrize("jobs", [1, 3])
def test_trials_begin_in_the_order_of_their_numbers_and_each_method_waits_for_its_own(jobs):
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0, "betas": [0.9, 0.999]}}
    settings = {"model": {"optimizer": optimizer}}
    plan = Plan([], {}, {"a": Method(), "b": Method()}, [1, 3], [2], [7, 8], lambda flags: settings, [9],
                search_trials=2, published=True)  # fmt: skip
    begun, ended = [], []

    def run(trial):
        begun.append(trial)
        ready = [other for other in ended if other.method == trial.method]
        kinds = [other.kind for other in ready]
        if trial.kind == "search":
            assert (kinds.count("grid"), kinds.count("search")) == (2, trial.place)
        elif trial.kind == "seed":
            assert (kinds.count("grid"), kinds.count("search"), kinds.count("published")) == (2, 2, 2)
        ended.append(trial)
        return "done"

    run_all(SimpleNamespace(plan=plan, run=run, prepare_data=lambda: None), jobs)
    assert sorted(trial.number for trial in begun) == list(range(16))
    if jobs == 1:
        assert [trial.number for trial in begun] == list(range(16))
        assert [(trial.method, trial.seed) for trial in begun[-4:]] == [("a", 7), ("b", 7), ("a", 8), ("b", 8)]
