"""The search for better rates around a grid, on functions whose minimum is known; and the order of all trials."""

import math
from types import SimpleNamespace

import pytest

from cola_lightning.compare.plan import Method, Plan
from cola_lightning.compare.rates import Rates
from cola_lightning.compare.results import TrialResults
from cola_lightning.compare.search import best_rates, edges, next_finalist, next_rates
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


def test_finalists_are_neighbors_of_the_best_in_the_order_of_the_sweep():
    swept = {
        Rates(1, 3, 0.98): 5.0, Rates(1, 3, 0.9): 5.1, Rates(1, 1, 0.98): 7.0, Rates(3, 3, 0.98): 6.0,
        Rates(3, 1, 0.98): 5.5, Rates(3, 9, 0.98): 9.0, Rates(9, 3, 0.98): 5.2,
    }  # fmt: skip
    begun = {Rates(1, 3, 0.98): 4.0}
    assert next_finalist(begun, swept) == Rates(9, 3, 0.98)  # (3, 1) differs in both rates
    begun |= {Rates(9, 3, 0.98): 8.0}
    assert next_finalist(begun, swept) == Rates(3, 3, 0.98)
    # From the best so far, with nothing beyond what is worse; and where nothing of the sweep is left, as the search of
    # a sweep.
    assert next_finalist(begun | {Rates(3, 3, 0.98): 3.0}, swept) == Rates(3, 1, 0.98)
    assert next_finalist(begun | {Rates(3, 3, 0.98): 4.5}, swept) == Rates(1, 1, 0.98)
    swept |= {Rates(27, 3, 0.98): 1.0, Rates(1, 0.3, 0.98): 1.0}  # beyond (3, 3) and (1, 1)
    begun |= {Rates(3, 3, 0.98): 4.5, Rates(1, 1, 0.98): 4.6}
    assert next_finalist(begun, swept, [0.98, 0.9]) == Rates(0.333, 3, 0.98) == next_rates(begun, [0.98, 0.9])


def test_another_beta2_of_the_best_hides_no_neighbor():
    swept = {Rates(1, 1, 0.98): 5.0, Rates(3, 1, 0.98): 6.0}
    assert next_finalist({Rates(1, 1, 0.98): 4.0, Rates(1, 1, 0.9): 4.5}, swept) == Rates(3, 1, 0.98)


LOW, HIGH, FAR = Rates(1, 1), Rates(1, 3), Rates(3, 3)


class Known(TrialResults):
    """Results of a sweep of three pairs at 10 tokens, of which some were trained to 40."""

    def __init__(self, largest: dict[Rates, float], failed: Rates | None = None, finalists: int = 2):
        grid = [LOW, HIGH, FAR]
        super().__init__(
            SimpleNamespace(
                budgets=[10, 40], seeds=[7], finalists=finalists, grid=lambda method: grid, sweep_trials=3, beta2=()
            ),
            None,
        )
        self.found = {(rates, 10): value for rates, value in zip(grid, (6.0, 5.0, 9.0), strict=True)}
        self.found |= {(rates, 40): value for rates, value in largest.items()}
        self.failed = failed

    def result(self, method, rates, seed, budget):
        assert seed == 7
        return {"perplexity": self.found[rates, budget]} if (rates, budget) in self.found else None

    def failure(self, method, rates, seed):
        return "out of memory" if rates == self.failed else None


def test_the_largest_budget_decides_between_the_finalists():
    """A rate that is best in a short run may be worse in a long one."""
    assert Known({}).finals("a") == {HIGH: None}
    assert Known({}).best("a") == HIGH  # none has ended: the best of the sweep
    assert Known({HIGH: 3.0}).finals("a") == {HIGH: 3.0, LOW: None}
    assert Known({LOW: 2.0, HIGH: 3.0}).best("a") == LOW
    assert Known({LOW: 4.0, HIGH: 3.0}).best("a") == HIGH
    assert Known({LOW: 2.0, HIGH: 3.0, FAR: 1.0}).best("a") == LOW  # no finalist
    assert Known({LOW: 2.0, HIGH: 3.0}, finalists=1).best("a") == HIGH
    assert Known({LOW: 2.0, HIGH: math.nan}).best("a") == LOW
    assert Known({LOW: 2.0}, failed=HIGH).best("a") == LOW
    assert Known({LOW: math.nan, HIGH: math.nan}).best("a") == HIGH


def test_the_seeds_wait_for_all_finalists():
    final = [SimpleNamespace(kind="final", method="a", place=place, matrix=None) for place in range(3)]
    known = Known({HIGH: 3.0, LOW: 2.0}, finalists=3)
    assert [known.rates(trial) for trial in final] == [HIGH, LOW, Rates(0.333, 1)]
    assert [known.has_ended(trial) for trial in final] == [True, True, False]
    known = Known({}, failed=HIGH)
    assert [known.has_ended(trial) for trial in final] == [True, False, False]


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
                search_trials=2, published=True, finalists=2)  # fmt: skip
    begun, ended = [], []

    def run(trial):
        begun.append(trial)
        ready = [other for other in ended if other.method == trial.method]
        kinds = [other.kind for other in ready]
        if trial.kind == "search":
            assert (kinds.count("grid"), kinds.count("search")) == (2, trial.place)
        elif trial.kind == "final":
            assert (kinds.count("search"), kinds.count("final")) == (2, trial.place)
        elif trial.kind == "seed":
            counts = [kinds.count(kind) for kind in ("grid", "search", "published", "final")]
            assert counts == [2, 2, 2, 2]
        ended.append(trial)
        return "done"

    run_all(SimpleNamespace(plan=plan, run=run, prepare_data=lambda: None), jobs)
    assert sorted(trial.number for trial in begun) == list(range(20))
    if jobs == 1:
        assert [trial.number for trial in begun] == list(range(20))
        assert [(trial.method, trial.seed) for trial in begun[-4:]] == [("a", 7), ("b", 7), ("a", 8), ("b", 8)]
