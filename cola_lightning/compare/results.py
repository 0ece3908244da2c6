"""Read the results of a comparison's trials: where each is, which have ended, and which rates are best so far."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cola_lightning.compare.outcome import StoredCosts, StoredResult, read
from cola_lightning.compare.plan import Plan, Trial, folder_name
from cola_lightning.compare.rates import Rates
from cola_lightning.compare.search import best_rates, next_finalist, next_rates

RESULT, FAILED, COSTS, CONFIG, STAGE, LOG = (
    "result.json", "failed.txt", "costs.json", "trial.yaml", "stage.yaml", "output.log",
)  # fmt: skip


class TrialResults:
    """Results of the trials of a plan in a folder.

    A trial has a folder: FOLDER/METHOD/mRATE-oRATE-bBETA2-seed-SEED. In it are ``trial.yaml``, its whole configuration;
    a run ``tokens-N`` for each budget, with ``result.json``; and, if it is trained to several budgets, the run
    ``trunk``, with the checkpoints from which the others begin. A trial of the sweep alone has one budget and no trunk.

    Args:
        plan: The plan.
        folder: Folder of the comparison.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.root = plan, folder

    def folder(self, method: str, rates: Rates, seed: int) -> Path:
        return self.root / folder_name(method) / f"{rates.name}-seed-{seed}"

    def run_dir(self, method: str, rates: Rates, seed: int, budget: int) -> Path:
        return self.folder(method, rates, seed) / f"tokens-{budget}"

    def result(self, method: str, rates: Rates, seed: int, budget: int) -> dict[str, Any] | None:
        return read(self.run_dir(method, rates, seed, budget) / RESULT, StoredResult)

    def failure(self, method: str, rates: Rates, seed: int) -> str | None:
        file = self.folder(method, rates, seed) / FAILED
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def costs(self, method: str) -> dict[str, Any] | None:
        measured = read(self.root / folder_name(method) / COSTS, StoredCosts)
        return measured and measured["subjects"][0]

    def outcome(self, method: str, rates: Rates, budget: int) -> float | None:
        """Return the perplexity of rates with the first seed: infinity if it failed, None if it has not ended."""
        seed = self.plan.seeds[0]
        if result := self.result(method, rates, seed, budget):
            return result["perplexity"]
        return None if self.failure(method, rates, seed) is None else math.inf

    def sweep(self, method: str) -> dict[Rates, float | None]:
        """Return the outcome of each trial of the sweep whose rates are known: the grid's, and the search's so far."""
        plan = self.plan
        choose = partial(next_rates, beta2=plan.beta2)
        return self._extend(method, plan.grid(method), plan.sweep_trials, plan.budgets[0], choose)

    def finals(self, method: str) -> dict[Rates, float | None]:
        """Return the outcome at the largest budget of each finalist whose rates are known: the best of the sweep, then
        neighbors of the best finalist so far, see ``next_finalist``."""
        plan, swept = self.plan, self.finite(method)
        if not swept:
            return {}
        choose = partial(next_finalist, sweep=swept, beta2=plan.beta2)
        return self._extend(method, [best_rates(swept)], plan.finalists, plan.budgets[-1], choose)

    def _extend(
        self, method: str, begun: list[Rates], number: int, budget: int, choose: Callable[[dict[Rates, float]], Rates]
    ) -> dict[Rates, float | None]:
        """Return the outcomes of ``begun``, and of what ``choose`` adds to them one by one, up to ``number`` in all.

        What is added follows from the plan and the outcomes before, so that an interruption changes none of it.
        """
        found = {rates: self.outcome(method, rates, budget) for rates in begun}
        while len(found) < number:
            ended = {rates: value for rates, value in found.items() if value is not None}
            if len(ended) < len(found):
                break
            rates = choose(ended)
            found[rates] = self.outcome(method, rates, budget)
        return found

    def finite(self, method: str, pairs: list[Rates] | None = None) -> dict[Rates, float]:
        """Return the perplexities of the sweep, or of ``pairs`` at the smallest budget, that are numbers."""
        if pairs is None:
            return _numbers(self.sweep(method))
        return _numbers({rates: self.outcome(method, rates, self.plan.budgets[0]) for rates in pairs})

    def best(self, method: str) -> Rates | None:
        """Return the finalist with the lowest perplexity at the largest budget so far. Before one has ended, that is
        the best of the sweep; None if the sweep has no run with a number."""
        finals = self.finals(method)
        ended = _numbers(finals)
        return best_rates(ended) if ended else next(iter(finals), None)

    def has_ended(self, trial: Trial) -> bool:
        """Say whether a trial of the sweep, or a finalist after it, has a result, failed, or is skipped."""
        rates = self.rates(trial)
        if rates is None:
            return trial.kind == "final" and not self.finals(trial.method)
        found = self.finals(trial.method) if trial.kind == "final" else self.sweep(trial.method)
        return found[rates] is not None

    def rates(self, trial: Trial) -> Rates | None:
        """Return the rates of a trial; None if trials before it have not ended, or the sweep has no best."""
        if trial.kind == "search":
            known = list(self.sweep(trial.method))[len(self.plan.grid(trial.method)) :]
            return known[trial.place] if trial.place < len(known) else None
        if trial.kind == "final":
            pairs = list(self.finals(trial.method))
            return pairs[trial.place] if trial.place < len(pairs) else None
        if trial.matrix is None:
            return self.best(trial.method)
        if trial.other is None:
            return next(rates for rates in self.plan.published_rates(trial.method) if rates.matrix == trial.matrix)
        return Rates(trial.matrix, trial.other, self.plan.first_beta2)


def _numbers(outcomes: dict[Rates, float | None]) -> dict[Rates, float]:
    """Return the outcomes of runs that ended with a finite perplexity."""
    return {rates: value for rates, value in outcomes.items() if value is not None and math.isfinite(value)}
