"""Collect the results of each method in one row of plain data."""

import math
import statistics
from pathlib import Path
from typing import Any

from cola_lightning.compare.outcome import loss_of
from cola_lightning.compare.plan import tokens_per_step
from cola_lightning.compare.rates import Rates
from cola_lightning.compare.results import TrialResults
from cola_lightning.compare.search import edges
from cola_lightning.compare.statistics import (
    Interval,
    bootstrap_interval,
    equal_flops,
    loss_at,
    middle,
    rank_ranges,
    x_of_loss,
)
from cola_lightning.compare.tasks import mean_scores

COSTS = ("parameters_m", "optimizer_mb", "activations_mb", "training_mb", "mflops_per_token")


def make_rows(trials: TrialResults) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Make the row of each method, and choose the FLOPs and the loss at which they are compared.

    Returns:
        The rows, the best first; and ``flops`` (None if FLOPs are not known), ``loss`` and ``loss_tokens``: the
        baseline's loss, and the tokens at which it has that loss.
    """
    rows = [make_row(trials, method) for method in trials.plan.methods]
    terms: dict[str, Any] = {"flops": None, "loss": None, "loss_tokens": None}
    largest = [row["curves"][0]["flops"][-1] for row in rows if row["curves"] and row["mflops_per_token"]]
    if largest and len(trials.plan.budgets) > 1:
        terms["flops"] = equal_flops(largest)
    baseline = next(row for row in rows if row["method"] == trials.plan.baseline)
    if baseline["curves"] and len(trials.plan.budgets) > 1:
        points = mean_curve(baseline, "tokens")
        terms["loss_tokens"] = middle(points[0][0], points[-1][0])
        terms["loss"] = loss_at(points, terms["loss_tokens"])
    for row in rows:
        row["loss_at_flops"] = loss_at_flops(row, terms["flops"])
        row["tokens_to_loss"] = tokens_to_loss(row, terms["loss"])
        row["headline"] = row["loss_at_flops"] or (row["loss"][-1] if row["loss"] else None)
    rows.sort(key=lambda row: row["headline"].mean if row["headline"] else math.inf)
    ranked = [row for row in rows if row["headline"] and len(row["seeds"]) > 1]  # one seed has no spread
    for row, rank in zip(ranked, rank_ranges([row["headline"] for row in ranked]), strict=True):
        row["rank"] = rank
    return rows, terms


def make_row(trials: TrialResults, method: str) -> dict[str, Any]:
    """Make the row of one method. What is not known is None or an empty list."""
    plan, best = trials.plan, trials.best(method)
    sweep, seed = trials.sweep(method), plan.seeds[0]
    finalists = trials.finals(method)
    ended = [rates for rates, value in sweep.items() if value is not None]
    ended_finals = [rates for rates, value in finalists.items() if value is not None]
    published = plan.published_rates(method) if plan.published else []
    at_published = trials.finite(method, published)
    row: dict[str, Any] = {
        "method": method,
        "rank": None,
        "rates": best,
        "edges": edges([*ended, *ended_finals], best) if best else [],
        "sweep": _entries(trials, method, sweep, plan.budgets[0]),
        "trials": f"{len(ended)} of {plan.sweep_trials}",
        "at_smallest_budget": trials.outcome(method, best, plan.budgets[0]) if best else None,
        "finals": _entries(trials, method, finalists, plan.budgets[-1]),
        "published_ratio": published[0].other / published[0].matrix if published else None,
        "perplexity_at_published_ratio": min(at_published.values()) if at_published else None,
        "differences": plan.differences(method),
    }
    row |= spent(trials, method, best)
    runs = trained_seeds(trials, method, best)
    per_token = (row["mflops_per_token"] or 0) * 1e6
    step = tokens_per_step(plan.configuration(method, best or Rates(1, 1), seed))
    row["seeds"] = list(runs)
    failed_seed = best and any(trials.failure(method, best, seed) for seed in plan.seeds)
    row["failed"] = bool(failed_seed or any(entry["failed"] for entry in row["sweep"] + row["finals"]))
    row["curves"] = [
        {
            "tokens": [result["tokens"] for result in results],
            "flops": [result["steps"] * step * per_token for result in results],
            "loss": [loss_of(result["perplexity"]) for result in results],
        }
        for results in runs.values()
    ]
    finals = [results[-1] for results in runs.values()]
    row["loss"] = [bootstrap_interval(losses) for losses in zip(*(c["loss"] for c in row["curves"]), strict=True)]
    for name in ("perplexity", "perplexity_as_published"):
        values = zip(*([result[name] for result in results] for results in runs.values()), strict=True)
        row[name] = [bootstrap_interval(value) for value in values]
    row["tokens"] = finals[0]["tokens"] if finals else None
    row["by_source"] = {
        name: bootstrap_interval([result["by_source"][name] for result in finals])
        for name in (finals[0]["by_source"] if finals else {})
    }
    row["tasks"] = mean_scores([result.get("tasks", {}) for result in finals])
    seconds = [result["seconds"] for result in finals]
    row["seconds"] = statistics.mean(seconds) if seconds and None not in seconds else None
    row["training_curves"] = [result["curve"] for result in finals]
    row["commits"] = sorted({result["commit"] for results in runs.values() for result in results if result["commit"]})
    return row


def _entries(
    trials: TrialResults, method: str, outcomes: dict[Rates, float | None], budget: int
) -> list[dict[str, Any]]:
    """Return the outcomes at a budget as plain data."""
    seed = trials.plan.seeds[0]
    return [
        rates._asdict()
        | {"perplexity": value, "failed": value is not None and trials.result(method, rates, seed, budget) is None}
        for rates, value in outcomes.items()
    ]


def trained_seeds(trials: TrialResults, method: str, best: Rates | None) -> dict[int, list[dict[str, Any]]]:
    """Return the results at the best rates, by seed and in the order of budgets, of seeds trained to all budgets."""
    found = {}
    for seed in trials.plan.seeds if best else ():
        assert best
        results = [trials.result(method, best, seed, budget) for budget in trials.plan.budgets]
        if all(results):
            found[seed] = [result for result in results if result]
    return found


def points_of(curve: dict[str, list[float]], x: str) -> list[tuple[float, float]]:
    return list(zip(curve[x], curve["loss"], strict=True))


def mean_curve(row: dict[str, Any], x: str) -> list[tuple[float, float]]:
    """Return the points (x, loss) of the budgets, as means over seeds."""
    curves = [points_of(curve, x) for curve in row["curves"]]
    return [(points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*curves, strict=True)]


def loss_at_flops(row: dict[str, Any], flops: float | None) -> Interval | None:
    """Return the loss at FLOPs over seeds; None if these FLOPs are outside the budgets of a seed."""
    if flops is None or not row["curves"]:
        return None
    found = [loss_at(points_of(curve, "flops"), flops) for curve in row["curves"]]
    known = [loss for loss in found if loss is not None]
    return bootstrap_interval(known) if len(known) == len(found) else None


def tokens_to_loss(row: dict[str, Any], loss: float | None) -> Interval | str | None:
    """Return the tokens to reach a loss over seeds; a text such as "> 1,000" if a seed does not within its budgets."""
    if loss is None or not row["curves"]:
        return None
    found = [x_of_loss(points_of(curve, "tokens"), loss) for curve in row["curves"]]
    known = [tokens for tokens in found if tokens is not None]
    if len(known) == len(found):
        return bootstrap_interval(known)
    curve = row["curves"][0]
    below = all(each["loss"][0] < loss for each in row["curves"])
    return f"< {curve['tokens'][0]:,.0f}" if below else f"> {curve['tokens'][-1]:,.0f}"


def spent(trials: TrialResults, method: str, best: Rates | None) -> dict[str, Any]:
    """Return parameters, bytes and FLOPs per token, as ``benchmark`` counted them."""
    costs = trials.costs(method)
    if costs is None:
        return dict.fromkeys(COSTS)
    config = trials.plan.configuration(method, best or Rates(1, 1), trials.plan.seeds[0])
    data = config["data"]["init_args"]
    tokens = data["batch_size"] * data["sequence_length"]  # tokens of the micro-batch that was measured
    micro_batches = tokens_per_step(config) / tokens
    step = micro_batches * costs["flops_step"] + costs["flops_optimizer"]
    activations = costs["saved_bytes_per_token_per_layer"] * tokens * config["model"]["num_hidden_layers"]
    kept = costs["parameter_bytes"] + costs["gradient_bytes"] + costs["optimizer_state_bytes"]
    values = (
        costs["parameters"] / 1e6,
        costs["optimizer_state_bytes"] / 1e6,
        activations / 1e6,
        (kept + activations) / 1e6,
        step / (micro_batches * tokens) / 1e6,
    )
    return dict(zip(COSTS, values, strict=True))


def run_folder_of(trials: TrialResults, row: dict[str, Any]) -> Path | None:
    """Return the run of a method at its best rates, with the first seed, to the largest budget."""
    if row["rates"] is None:
        return None
    return trials.run_dir(row["method"], row["rates"], trials.plan.seeds[0], trials.plan.budgets[-1])
