"""Write the report of a comparison: a page of Markdown with tables and plots, and the figures as JSON and CSV."""

import csv
import io
import math
import os
from datetime import date
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cola_lightning.benchmark.report import processor
from cola_lightning.compare.outcome import write
from cola_lightning.compare.plan import Plan
from cola_lightning.compare.results import STAGE, TrialResults
from cola_lightning.compare.rows import make_rows, run_folder_of
from cola_lightning.compare.tables import markdown, number, rank, tables
from cola_lightning.output_files import write_whole
from cola_lightning.provenance import libraries


def write_report(trials: TrialResults, folder: Path, command_line: str, threads: int) -> None:
    """Write ``report.md``, ``table.md``, ``results.json``, ``results.csv`` and, if matplotlib is installed, the plots.

    ``table.md`` is the part of the report that is equal whenever the same machine trains the plan again.
    """
    rows, terms = make_rows(trials)
    folder.mkdir(parents=True, exist_ok=True)
    facts = setting(trials.plan, command_line, threads)
    write(folder / "results.json", _strict({"setting": facts, "at": terms, "methods": rows}))
    _write_csv(rows, folder / "results.csv")
    table = tables(trials.plan, rows, terms)
    write_whole(folder / "table.md", table)
    plots: list[str] = []
    try:
        from cola_lightning.compare.plots import write_plots
    except ModuleNotFoundError as error:
        rank_zero_warn(f"no plots: {error.name} is not installed; run: pip install 'cola-lightning[plots]'")
    else:
        plots = write_plots(rows, terms, trials.plan.baseline, folder)
    page = ["# Comparison", "", *plots_section(plots), table, *provenance(trials, rows, facts)]
    write_whole(folder / "report.md", "\n".join(page) + "\n")
    rank_zero_info(f"Report: {folder / 'report.md'}")


def plots_section(plots: list[str]) -> list[str]:
    return [line for name in plots for line in (f"![{name.removesuffix('.png').replace('_', ' ')}]({name})", "")]


def provenance(trials: TrialResults, rows: list[dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    """Return the sections on speed, commands, machine and commit. ``facts`` are those of ``setting``."""
    lines = [
        [row["method"], number(row["tokens"] and row["tokens"] / 1e6), number(row["seconds"]),
         number(row["seconds"] and row["tokens"] / row["seconds"])]
        for row in rows
    ]  # fmt: skip
    table = markdown(["method", "tokens, M", "seconds of training", "tokens/s"], lines)
    commits = sorted({commit for row in rows for commit in row["commits"]})
    versions = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
    example = next((folder for row in rows if (folder := run_folder_of(trials, row))), None)
    commands = [facts["command"]]
    if example:
        commands.append(f"python -m cola_lightning fit --config {example / STAGE} --run_dir ANOTHER_FOLDER")
    return [
        "## Speed", "", *table, "", "Seconds depend on what else the machine did; they are a mean over seeds.", "",
        "## How it was made", "", "```sh", *commands, "```", "",
        "The first command makes this page. The second trains one run again by its whole configuration; with several "
        "budgets, add `--ckpt_path` with the trunk's checkpoint.", "",
        f"{facts['date']}, commit {', '.join(commits) or 'unknown'}; {facts['device']}, {facts['threads']} threads for "
        f"each run; {versions}.", "",
    ]  # fmt: skip


def setting(plan: Plan, command_line: str, threads: int) -> dict[str, Any]:
    """Return what the results depend on: the plan's terms, libraries and machine; and the command and its date."""
    return {
        "command": command_line,
        "date": date.today().isoformat(),
        "budgets": plan.budgets,
        "seeds": plan.seeds,
        "weight_decay": plan.weight_decay,
        "configs": plan.configs,
        "flags": plan.common,
        "baseline": plan.baseline,
        "libraries": libraries(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
    }


def _write_csv(rows: list[dict[str, Any]], file: Path) -> None:
    columns = (
        "method", "rank", "seeds", "matrix_rate", "other_rate", "beta2", "loss", "loss_low", "loss_high", "perplexity",
        "loss_at_flops", "parameters_m", "mflops_per_token", "optimizer_mb", "training_mb", "tokens",
    )  # fmt: skip
    stream = io.StringIO(newline="")
    table = csv.DictWriter(stream, columns, extrasaction="ignore")
    table.writeheader()
    for row in rows:
        loss = row["loss"][-1] if row["loss"] else (None, None, None)
        at = row["loss_at_flops"]
        best = row["rates"] or (None, None, None)
        own = dict(zip(("loss", "loss_low", "loss_high"), loss, strict=True)) | {"seeds": len(row["seeds"])}
        own |= {"perplexity": row["perplexity"][-1].mean if row["perplexity"] else None, "rank": rank(row["rank"])}
        own |= dict(zip(("matrix_rate", "other_rate", "beta2"), best, strict=True))
        own |= {"loss_at_flops": at.mean if at else None}
        table.writerow(row | own)
    write_whole(file, stream.getvalue())


def _strict(value: Any) -> Any:
    """Replace NaN and infinity by text, because JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
