"""Describe a comparison: methods, learning rates, seeds and budgets, and the trials that follow from them."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from cola_lightning.compare.plan_checks import (
    check_budgets,
    check_files,
    check_lists,
    check_names,
    check_rates,
    check_search,
)
from cola_lightning.compare.rates import Rates, flatten, published_ratio, set_rates, set_weight_decay
from cola_lightning.data.token_data_module import resolve_global_batch_size
from cola_lightning.errors import InputError
from cola_lightning.optim.schedules import decay_start

Flag = bool | int | float | str | None

Resolve = Callable[[list[str]], dict[str, Any]]
"""``f(flags)`` returns the whole configuration that ``fit`` makes of these flags."""

Kind = Literal["grid", "search", "published", "final", "seed"]
KINDS: tuple[Kind, ...] = ("grid", "search", "published", "final", "seed")
"""Kinds of trials, in the order in which those of a method are carried out."""
SCHEDULE = "WarmupStableDecay"


@dataclass
class Method:
    """Method that is compared.

    Args:
        configs: Configs that follow the plan's own, such as ``configs/method/cola.yaml``.
        flags: Settings that follow these, as on the command line, such as ``model.projection.rank: 32``.
        matrix_rates: Learning rates of the projections' matrices, in place of the plan's and as many as those.
        other_rates: Learning rates of all other parameters, in the same way.
    """

    configs: list[str] = field(default_factory=list)
    flags: dict[str, Flag] = field(default_factory=dict)
    matrix_rates: list[float] | None = None
    other_rates: list[float] | None = None


@dataclass
class HeldOut:
    """Groups of the validation documents by source.

    Args:
        column: Key that names the source of a document.
        groups: Name of each group, and a regular expression that matches the column.
    """

    column: str
    groups: dict[str, str]


@dataclass(frozen=True)
class Trial:
    """Training of a method with one pair of learning rates and one seed.

    Args:
        number: Counted from 0; an array job runs one trial by its number.
        method: Name of the method.
        kind: ``grid`` and ``search`` are the sweep. A search's rates follow from the trials before it.
            ``published`` uses the ratio of the two rates in the method's own files. ``final`` uses the best
            rates of the sweep or neighbors, and ``seed`` the best of these at the largest budget; both use all budgets.
        seed: Seed of the run.
        matrix: Learning rate of the matrices; None if other trials determine it.
        other: Learning rate of the other parameters; None likewise, or if the published ratio sets it.
        place: Number of a search or final trial among those of its method, from 0.
    """

    number: int
    method: str
    kind: Kind
    seed: int
    matrix: float | None = None
    other: float | None = None
    place: int = 0

    @property
    def title(self) -> str:
        if self.kind == "search":
            rates = f"further trial {self.place + 1}"
        elif self.kind == "final":
            rates = f"finalist {self.place + 1}"
        elif self.matrix is None:
            rates = "best rates"
        elif self.other is None:
            rates = f"matrix rate {self.matrix:g}, other rate by the published ratio"
        else:
            rates = f"matrix rate {self.matrix:g}, other rate {self.other:g}"
        return f"{self.method}, {rates}, seed {self.seed}"


class Plan:
    """The trials of a comparison.

    For each method, each pair of learning rates is tried with the first seed at the smallest budget, and then a number
    of neighbors of the best, see ``next_rates``. Then the best of these and some neighbors are trained to all budgets,
    see ``next_finalist``, and the best at the largest budget with all seeds. Every method has the same number of
    trials.

    Args:
        configs: Configs that all methods share.
        flags: Settings after all configs and all methods' flags.
        methods: The methods, by name.
        matrix_rates: Learning rates of the projections' matrices.
        other_rates: Learning rates of all other parameters: embedding, head, norms.
        seeds: Seeds of the runs. The sweep uses the first.
        resolve: Function that makes a whole configuration.
        budgets: Tokens that a method is trained on. If not given, one: that of the configs' ``trainer.max_steps``.
            Several need the schedule ``WarmupStableDecay``.
        weight_decay: Weight decay of all parameters of all methods; if not given, that of each method's files.
        search_trials: Trials of each method after the grid, near the best.
        beta2: Values of β2. The grid has the first, and the search tries the others.
        finalists: Trials of each method at all budgets with the first seed, before the other seeds.
        published: Try also the ratio of the two rates in each method's own files.
        baseline: The method with which the others are compared; the first if not given.
        held_out: Groups of the validation documents; perplexity is then reported for each.
        tasks: Names of lm-eval's tasks that score the methods at the largest budget.
        include_path: Folder with task files of one's own.

    Raises:
        InputError: If a list is empty or repeats itself, a value is out of range, methods have unequal numbers of
            trials, two names make one folder, or a file is missing.
    """

    def __init__(
        self,
        configs: list[str],
        flags: dict[str, Flag],
        methods: dict[str, Method],
        matrix_rates: list[float],
        other_rates: list[float],
        seeds: list[int],
        resolve: Resolve,
        budgets: list[int] | None = None,
        weight_decay: float | None = None,
        search_trials: int = 0,
        beta2: list[float] | None = None,
        finalists: int = 1,
        published: bool = False,
        baseline: str | None = None,
        held_out: HeldOut | None = None,
        tasks: list[str] | None = None,
        include_path: str | None = None,
    ) -> None:
        check_lists(methods=[*methods], matrix_rates=matrix_rates, other_rates=other_rates, seeds=seeds)
        check_lists(budgets=budgets, beta2=beta2)
        check_rates(methods, matrix_rates=matrix_rates, other_rates=other_rates)
        check_budgets(budgets)
        check_search(search_trials, beta2 or [], finalists)
        check_names({method: folder_name(method) for method in methods}, baseline)
        check_files([*configs, *(file for method in methods.values() for file in method.configs)])
        self.configs, self.common, self.methods = configs, flags, methods
        self.matrix_rates, self.other_rates, self.seeds = matrix_rates, other_rates, seeds
        self.resolve, self.weight_decay, self.held_out = resolve, weight_decay, held_out
        self.tasks, self.include_path = tasks or [], include_path
        self.baseline = baseline or next(iter(methods))
        self._budgets = budgets
        self.search_trials, self.beta2, self.published = search_trials, beta2 or [], published
        self.finalists = finalists
        self.trials = self._number_trials()
        self._resolved: dict[str, dict[str, Any]] = {}

    def _number_trials(self) -> list[Trial]:
        trials: list[Trial] = []
        for name in self.methods:
            for rates in self.grid(name):
                trials.append(Trial(len(trials), name, "grid", self.seeds[0], rates.matrix, rates.other))
        # From here on, methods take turns, so that a part of the comparison has all of them.
        for place in range(self.search_trials):
            for name in self.methods:
                trials.append(Trial(len(trials), name, "search", self.seeds[0], place=place))
        for name in self.methods if self.published else ():
            for matrix in self.matrix_rates_of(name):
                trials.append(Trial(len(trials), name, "published", self.seeds[0], matrix))
        for place in range(self.finalists if self.finalists > 1 else 0):
            for name in self.methods:
                trials.append(Trial(len(trials), name, "final", self.seeds[0], place=place))
        for seed in self.seeds:
            for name in self.methods:
                trials.append(Trial(len(trials), name, "seed", seed))
        return trials

    # -- learning rates -----------------------------------------------------------------------------------------------

    def matrix_rates_of(self, method: str) -> list[float]:
        return sorted(self.methods[method].matrix_rates or self.matrix_rates)

    def other_rates_of(self, method: str) -> list[float]:
        return sorted(self.methods[method].other_rates or self.other_rates)

    def grid(self, method: str) -> list[Rates]:
        """List all pairs of rates that the sweep begins with for a method."""
        pairs = product(self.matrix_rates_of(method), self.other_rates_of(method))
        return [Rates(*pair, self.first_beta2) for pair in pairs]

    @property
    def first_beta2(self) -> float | None:
        return self.beta2[0] if self.beta2 else None

    @property
    def sweep_trials(self) -> int:
        """Number of trials in the sweep of each method."""
        return len(self.matrix_rates) * len(self.other_rates) + self.search_trials

    def published_rates(self, method: str) -> list[Rates]:
        """List the pairs of rates with the ratio of the method's own files."""
        ratio = published_ratio(self._base(method)["model"]["optimizer"])
        beta2 = self.first_beta2
        return [Rates(matrix, float(f"{matrix * ratio:.6g}"), beta2) for matrix in self.matrix_rates_of(method)]

    # -- budgets ------------------------------------------------------------------------------------------------------

    @property
    def budgets(self) -> list[int]:
        """Budgets in tokens, ascending."""
        if self._budgets is None:
            config = self._base(next(iter(self.methods)))
            self._budgets = [config["trainer"]["max_steps"] * tokens_per_step(config)]
        return sorted(self._budgets)

    def steps(self, method: str, budget: int) -> int:
        """Convert a budget to optimizer steps."""
        return max(1, round(budget / tokens_per_step(self._base(method))))

    def trunk_steps(self, method: str, budget: int) -> int:
        """Return the optimizer steps of a budget before the decay begins.

        Raises:
            InputError: If the method's schedule is not ``WarmupStableDecay``, or its warmup is longer.
        """
        schedule = self._base(method)["model"]["schedule"]
        if schedule["class_path"].rpartition(".")[2] != SCHEDULE:
            raise InputError(
                f"{method} has the schedule {schedule['class_path']}, but several budgets need {SCHEDULE}, because "
                f"all of them start from one run; set model.schedule, or one budget"
            )
        start = decay_start(self.steps(method, budget), schedule["init_args"]["decay_share"])
        warmup = schedule["init_args"]["warmup_steps"]
        if start < max(1, warmup):
            raise InputError(
                f"the decay of {method} at {budget:,} tokens begins after {start} steps, within the warmup of "
                f"{warmup}; raise the budget, or lower warmup_steps"
            )
        return start

    # -- configurations -----------------------------------------------------------------------------------------------

    def command_line(self, method: str) -> list[str]:
        """Return the flags of ``fit`` for a method, with the values of its files."""
        chosen = self.methods[method]
        files = [f"--config={file}" for file in [*self.configs, *chosen.configs]]
        return files + [f"--{name}={as_text(value)}" for name, value in (chosen.flags | self.common).items()]

    def _base(self, method: str) -> dict[str, Any]:
        if method not in self._resolved:
            self._resolved[method] = self.resolve(self.command_line(method))
        return self._resolved[method]

    def configuration(self, method: str, rates: Rates, seed: int) -> dict[str, Any]:
        """Return the whole configuration of a trial, except its length and its folder."""
        config = deepcopy(self._base(method))
        config["model"]["optimizer"] = set_rates(config["model"]["optimizer"], rates)
        if self.weight_decay is not None:
            set_weight_decay(config["model"]["optimizer"], self.weight_decay)
        return config | {"seed_everything": seed}

    def differences(self, method: str) -> dict[str, Any]:
        """Return the settings of a method that differ from the baseline's, without what is swept.

        Settings that only the baseline's classes have are not included, nor is β2 if the sweep has it.
        """
        rates = Rates(1.0, 1.0, self.first_beta2)
        own, other = (flatten(self.configuration(name, rates, 0)) for name in (method, self.baseline))
        return {key: value for key, value in own.items() if value != other.get(key)}


def tokens_per_step(config: dict[str, Any]) -> int:
    """Return the tokens of an optimizer step, padding included."""
    data = config["data"]["init_args"]
    rows = resolve_global_batch_size(
        data.get("global_batch_size"), data.get("global_batch_tokens"), data["sequence_length"]
    )
    return (rows or data["batch_size"] * config["trainer"]["accumulate_grad_batches"]) * data["sequence_length"]


def as_text(value: Flag) -> str:
    """Write a value as it is typed."""
    return value if isinstance(value, str) else json.dumps(value)


def folder_name(method: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-")
