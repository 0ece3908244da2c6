"""Lay out the tables of a comparison's report in Markdown, each with the text that explains it."""

import json
import math
from collections.abc import Sequence
from typing import Any

from cola_lightning.compare.plan import Plan
from cola_lightning.compare.statistics import Interval
from cola_lightning.compare.tasks import Score

INTERVALS = (
    "Each value is the mean over the seeds, in brackets its 95 % percentile bootstrap interval over seeds. Of three "
    "seeds that interval is from the least to the greatest, and covers the true mean in about 75 % of cases. A rank is "
    "the range that the intervals allow: two methods whose intervals overlap share at least one rank. A method with "
    "one seed has no interval, and no rank."
)


def tables(plan: Plan, rows: list[dict[str, Any]], terms: dict[str, Any]) -> str:
    """Return all tables that do not depend on the speed of the machine."""
    sections = [headline, by_budget, by_source, by_task, rates, finals, sweep, costs, differences]
    return "\n".join(line for section in sections for line in section(plan, rows, terms))


def headline(plan: Plan, rows: list[dict[str, Any]], terms: dict[str, Any]) -> list[str]:
    budget, flops, loss = plan.budgets[-1], terms["flops"], terms["loss"]
    header = ["rank", "method", "seeds"]
    if flops is not None:
        header.append(f"loss at {flops / 1e12:.4g} TFLOPs")
    if loss is not None:
        header.append(f"tokens to loss {loss:.4f}, M")
    header += [f"loss at {budget / 1e6:.4g}M tokens", "perplexity there", "TFLOPs there", "parameters, M"]
    lines = []
    for row in rows:
        seeds = len(plan.seeds)
        cells = [rank(row["rank"]), row["method"], f"{len(row['seeds'])} of {seeds}"]
        if flops is not None:
            cells.append(interval(row["loss_at_flops"], ".4f"))
        if loss is not None:
            found = row["tokens_to_loss"]
            outside = isinstance(found, str)
            cells.append(f"{found[0]} {float(found[2:].replace(',', '')) / 1e6:.3g}" if outside else millions(found))
        without = "failed" if row["failed"] else "not run"
        cells.append(interval(row["loss"][-1], ".4f") if row["loss"] else without)
        cells.append(interval(row["perplexity"][-1], ",.2f") if row["perplexity"] else "–")
        flops_there = row["curves"][0]["flops"][-1] if row["curves"] and row["mflops_per_token"] else None
        cells += [number(flops_there and flops_there / 1e12), number(row["parameters_m"])]
        lines.append(cells)
    text = []
    if flops is not None:
        text.append(
            "**Loss at equal FLOPs** is interpolated along each method's budgets, in the logarithms of both (by a "
            "parabola through three budgets). The FLOPs are the most that every method reaches."
        )
    if loss is not None:
        text.append(
            f"**Tokens to equal loss** are those until the loss that {plan.baseline} has at "
            f"{terms['loss_tokens'] / 1e6:.4g}M tokens, the geometric mean of its smallest and its largest budget."
        )
    text.append(
        f"{INTERVALS} Losses are in nats per token of the held-out text. FLOPs are counted: forward, backward, and the "
        f"optimizer's matrix products, not its decompositions."
    )
    return ["## Result", "", *markdown(header, lines), "", *text, ""]


def by_budget(plan: Plan, rows: list[dict[str, Any]], terms: dict[str, Any]) -> list[str]:
    header = ["perplexity at, M tokens", *(f"{budget / 1e6:.4g}" for budget in plan.budgets), "as published"]
    lines = []
    for row in rows:
        values = [interval(value, ",.2f") for value in row["perplexity"]] or ["–"] * len(plan.budgets)
        published = row["perplexity_as_published"]
        lines.append([row["method"], *values, number(published[-1].mean if published else None)])
    note = "The last column is the last budget's by the formula of the published scripts, which gives less."
    return ["## By budget", "", *markdown(header, lines), "", note, ""]


def by_source(plan: Plan, rows: list[dict[str, Any]], terms: dict[str, Any]) -> list[str]:
    names = next((list(row["by_source"]) for row in rows if row["by_source"]), [])
    if not names:
        return []
    lines = [[row["method"], *(interval(row["by_source"].get(name), ",.2f") for name in names)] for row in rows]
    note = "Held-out documents, each read by itself, at the largest budget."
    return ["## Perplexity by source", "", *markdown(["method", *names], lines), "", note, ""]


def by_task(plan: Plan, rows: list[dict[str, Any]], terms: dict[str, Any]) -> list[str]:
    names = next((list(row["tasks"]) for row in rows if row["tasks"]), [])
    if not names:
        return []
    lines = [[row["method"], *(score(row["tasks"].get(name)) for name in names)] for row in rows]
    note = (
        "Tasks of lm-eval at the largest budget: the mean over seeds ± the standard error of one run, which comes from "
        "the number of examples and does not shrink with more seeds."
    )
    return ["## Tasks", "", *markdown(["method", *names], lines), "", note, ""]


def rates(plan: Plan, rows: list[dict[str, Any]], terms: dict[str, Any]) -> list[str]:
    names = swept(plan)
    header = ["method", *names.values(), "perplexity", "trials"]
    if plan.published:
        header += ["published ratio", "perplexity at it"]
    lines = []
    for row in rows:
        best = row["rates"]
        cells = [f"{getattr(best, name):g}{' *' if name in row['edges'] else ''}" if best else "–" for name in names]
        cells += [number(row["at_smallest_budget"]), row["trials"]]
        if plan.published:
            cells += [number(row["published_ratio"]), number(row["perplexity_at_published_ratio"])]
        lines.append([row["method"], *cells])
    text = (
        f"The best of {len(plan.matrix_rates)} x {len(plan.other_rates)} pairs of learning rates, of the projections' "
        f"matrices and of all other parameters"
    )
    if plan.search_trials:
        text += f", and of {plan.search_trials} further trials near the best, which go beyond these rates"
    text += (
        f", tried for every method with seed {plan.seeds[0]} at {plan.budgets[0] / 1e6:.4g}M tokens. A * marks a value "
        f"that is the lowest or the highest that was tried: a further one may be better."
    )
    if plan.beta2:
        text += f" β₂ begins with {plan.beta2[0]:g}; of the values {plan.beta2} the best is kept."
    if plan.finalists > 1:
        text += (
            f" Of each method {plan.finalists} finalists, see below, were trained to {plan.budgets[-1] / 1e6:.4g}M "
            f"tokens, and here is the one that is best there."
        )
    if plan.published:
        text += " The last columns have the best of the same matrix rates with the ratio of the method's own files."
    return ["## Learning rates", "", *markdown(header, lines), "", text, ""]


def finals(plan: Plan, rows: list[dict[str, Any]], terms: dict[str, Any]) -> list[str]:
    if plan.finalists == 1:
        return []
    note = (
        f"Perplexity at {plan.budgets[-1] / 1e6:.4g}M tokens with seed {plan.seeds[0]}, in the order of the trials: "
        f"the best rates at {plan.budgets[0] / 1e6:.4g}M tokens first, then neighbors of the best so far."
    )
    return ["## Finalists", "", *outcomes(plan, rows, "finals"), "", note, ""]


def sweep(plan: Plan, rows: list[dict[str, Any]], terms: dict[str, Any]) -> list[str]:
    head = ["<details><summary>Every trial of the sweep</summary>", ""]
    return [*head, *outcomes(plan, rows, "sweep"), "", "</details>", ""]


def outcomes(plan: Plan, rows: list[dict[str, Any]], key: str) -> list[str]:
    """Return the table of all methods' trials under a key of their rows."""
    lines, names = [], swept(plan)
    for row in rows:
        for entry in row[key]:
            value = "failed" if entry["failed"] else number(entry["perplexity"])
            lines.append([row["method"], *(f"{entry[name]:g}" for name in names), value])
    return markdown(["method", *names.values(), "perplexity"], lines)


def swept(plan: Plan) -> dict[str, str]:
    """Return what the sweep varies, each with its heading."""
    return {"matrix": "matrix rate", "other": "other rate"} | ({"beta2": "β₂"} if plan.beta2 else {})


def costs(plan: Plan, rows: list[dict[str, Any]], terms: dict[str, Any]) -> list[str]:
    columns = {
        "parameters_m": "parameters, M", "mflops_per_token": "MFLOPs per token", "optimizer_mb": "optimizer state, MB",
        "activations_mb": "activations, MB", "training_mb": "all memory, MB",
    }  # fmt: skip
    lines = [[row["method"], *(number(row[name]) for name in columns)] for row in rows]
    text = (
        "Counted by `benchmark`. Activations are those that the decoder layers keep between forward and backward for "
        "one micro-batch; all memory adds weights, gradients and optimizer state."
    )
    return ["## Costs", "", *markdown(["method", *columns.values()], lines), "", text, ""]


def differences(plan: Plan, rows: list[dict[str, Any]], terms: dict[str, Any]) -> list[str]:
    lines = []
    for row in rows:
        if row["method"] == plan.baseline:
            continue
        named = "; ".join(f"`{key}` {shorten(value)}" for key, value in row["differences"].items())
        lines.append(f"- {row['method']}: {named or 'nothing'}")
    text = f"All settings in which a method differs from {plan.baseline}, learning rates left out:"
    return ["## Terms", "", text, "", *lines, ""]


# -- cells ------------------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [header, ["---"] * len(header), *lines]
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def interval(value: Interval | None, form: str) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value.mean):
        return "diverged"
    mean = f"{value.mean:{form}}"
    return mean if value.low == value.high else f"{mean} ({value.low:{form}}–{value.high:{form}})"


def score(value: Score | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.4f}" + ("" if value.error is None else f" ± {value.error:.4f}")


def millions(value: Interval | None) -> str:
    return interval(value and Interval(*(end / 1e6 for end in value)), ".3g")


def rank(value: tuple[int, int] | None) -> str:
    if value is None:
        return "–"
    return str(value[0]) if value[0] == value[1] else f"{value[0]}–{value[1]}"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def shorten(value: Any) -> str:
    """Shorten the value of a setting: a class to its name, and the entries of a list likewise."""
    if isinstance(value, list):
        return "[" + ", ".join(shorten(one) for one in value) + "]"
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    text = str(value).rpartition(".")[2] if str(value).startswith("cola_lightning.") else json.dumps(value)
    return text
