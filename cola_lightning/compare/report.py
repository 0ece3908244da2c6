"""The table of a comparison, as Markdown, JSON and CSV."""

import csv
import math
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cola_lightning.compare.plan import learning_rates
from cola_lightning.compare.trials import SweepRunner, write
from cola_lightning.data.token_data_module import resolve_global_batch_size

COLUMNS = {
    "method": "method",
    "learning_rate": "best learning rate",
    "perplexity": "perplexity",
    "perplexity_as_published": "as published",
    "parameters_m": "parameters, M",
    "optimizer_mb": "optimizer state, MB",
    "activations_mb": "activations, MB",
    "training_mb": "all memory, MB",
    "mflops_per_token": "MFLOPs a token",
    "tflops": "TFLOPs in all",
    "tokens_per_second": "tokens/s",
    "trials": "trials",
}


def write_report(runner: SweepRunner, folder: Path) -> None:
    """Write ``table.md``, ``results.json``, ``results.csv`` and, where matplotlib is there, three plots."""
    rows = [row(runner, method) for method in runner.plan.methods]
    rows.sort(key=lambda r: r["perplexity"] if r["perplexity"] is not None else math.inf)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "results.json", _strict({"setting": setting(runner), "methods": rows}))
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    (folder / "table.md").write_text(markdown(runner, rows), encoding="utf-8")
    try:
        from cola_lightning.compare.plots import write_plots
    except ModuleNotFoundError as error:
        rank_zero_warn(f"no plots, for {error.name} is not installed; run: pip install 'cola-lightning[plots]'")
    else:
        write_plots(rows, folder)
    rank_zero_info(f"Table and plots: {folder}")


def row(runner: SweepRunner, method: str) -> dict[str, Any]:
    """All that is known of a method; None where it is not."""
    sweep, best, seeds = runner.sweep(method), runner.best(method), runner.plan.seeds
    factors = runner.plan.learning_rates
    config = runner.plan.configuration(method, best or 1.0, seeds[0], Path())
    failed = [f for f in factors if runner.failure(method, f, seeds[0])]
    result: dict[str, Any] = {
        "method": method,
        "learning_rates": learning_rates(config["model"]["optimizer"]) if best else None,
        "factor": best,
        "at_edge": best is not None and len(factors) > 1 and best in (factors[0], factors[-1]),
        "sweep": {f"{factor:g}": sweep[factor]["perplexity"] if factor in sweep else None for factor in factors},
        "failed": failed,
        "trials": f"{len(sweep)} of {len(factors)}",
    }
    found = [runner.result(method, best, seed) for seed in seeds] if best else []
    runs = [run for run in found if run]
    for name in ("perplexity", "perplexity_as_published", "tokens", "tokens_per_second"):
        result[name] = statistics.mean(run[name] for run in runs) if runs else None
    result["perplexities"] = [run["perplexity"] for run in runs]
    result["seeds"] = [run["seed"] for run in runs]
    result["learning_rate"] = " and ".join(f"{rate:g}" for rate in result["learning_rates"] or [])
    result["curve"] = runs[0]["curve"] if runs else []
    result["commits"] = sorted({run["commit"] for run in [*runs, *sweep.values()] if run["commit"]})
    return result | spent(runner, method, config)


def spent(runner: SweepRunner, method: str, config: dict[str, Any]) -> dict[str, Any]:
    """Parameters, bytes and FLOPs, as counted by ``benchmark``."""
    costs = runner.costs(method)
    names = ("parameters_m", "optimizer_mb", "activations_mb", "training_mb", "mflops_per_token", "tflops")
    if costs is None:
        return dict.fromkeys(names)
    data, trainer = config["data"]["init_args"], config["trainer"]
    tokens = data["batch_size"] * data["sequence_length"]  # of the micro-batch that was measured
    stated = resolve_global_batch_size(
        data.get("global_batch_size"), data.get("global_batch_tokens"), data["sequence_length"]
    )
    accumulated = stated / data["batch_size"] if stated else trainer["accumulate_grad_batches"]
    step = accumulated * costs["flops_step"] + costs["flops_optimizer"]
    activations = costs["saved_bytes_per_token_per_layer"] * tokens * config["model"]["num_hidden_layers"]
    kept = costs["parameter_bytes"] + costs["gradient_bytes"] + costs["optimizer_state_bytes"]
    values = (
        costs["parameters"] / 1e6,
        costs["optimizer_state_bytes"] / 1e6,
        activations / 1e6,
        (kept + activations) / 1e6,
        step / (accumulated * tokens) / 1e6,
        step * trainer["max_steps"] / 1e12,
    )
    return dict(zip(names, values, strict=True))


def setting(runner: SweepRunner) -> dict[str, Any]:
    plan = runner.plan
    return {
        "learning_rate_factors": plan.learning_rates,
        "seeds": plan.seeds,
        "configs": plan.configs,
        "flags": plan.common,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def markdown(runner: SweepRunner, rows: list[dict[str, Any]]) -> str:
    plan = runner.plan
    lines = [
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(trial(row, name) for name in COLUMNS) + " |" for row in rows),
        "",
        f"Trials for each method: {len(plan.learning_rates)} learning rates, its own times "
        f"{', '.join(f'{factor:g}' for factor in plan.learning_rates)}, with seed {plan.seeds[0]}; the best then with "
        f"{', '.join(f'seed {seed}' for seed in plan.seeds[1:]) or 'no other seed'} too. Perplexities are means over "
        f"these seeds, in brackets each. A * marks a best that is the lowest or the highest that was tried: a further "
        f"one may be better. Activations are those that the decoder layers keep between forward and backward for one "
        f"micro-batch; all memory adds weights, gradients and optimizer state. FLOPs are counted, the optimizer's "
        f"matrix products included, decompositions not. Tokens a second depend on what else the machine did.",
        "",
        "Perplexity of every trial:",
        "",
        "| method | " + " | ".join(f"x {factor:g}" for factor in plan.learning_rates) + " |",
        "|" + "---|" * (1 + len(plan.learning_rates)),
    ]
    for row in rows:
        trials = [
            f"{value:,.1f}" if value is not None else "failed" if float(factor) in row["failed"] else "not run"
            for factor, value in row["sweep"].items()
        ]
        lines.append(f"| {row['method']} | " + " | ".join(trials) + " |")
    commits = sorted({commit for row in rows for commit in row["commits"]})
    device = setting(runner)
    lines += ["", f"Commit {', '.join(commits) or 'unknown'}; {device['device']}, {device['cores']} cores, torch "
              f"{device['torch']}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def trial(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if name == "perplexity" and value is not None:
        return f"{value:,.1f} ({', '.join(f'{one:,.1f}' for one in row['perplexities'])})"
    if name == "learning_rate":
        return f"{value}{' *' if row['at_edge'] else ''}" or "–"
    if isinstance(value, str):
        return value
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _strict(value: Any) -> Any:
    """JSON has no nan and no infinity, and not every reader takes Python's: a run that ended so has a word there."""
    if isinstance(value, dict):
        return {key: _strict(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_strict(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
