"""Run trials: each run is a process of its own, writes its result to a file, and resumes after an interruption."""

import math
import re
import shutil
import signal
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from threading import Lock
from typing import Any

import yaml
from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.utilities import rank_zero_warn

from cola_lightning.checkpoints.latest import LINK, checkpoint_name, written
from cola_lightning.compare.held_out import evaluate_sources, split_by_source
from cola_lightning.compare.outcome import StoredCosts, StoredResult, read, read_outcome, write
from cola_lightning.compare.plan import Plan, Trial, folder_name
from cola_lightning.compare.processes import run
from cola_lightning.compare.rates import Rates, flatten
from cola_lightning.compare.search import best_rates, next_rates
from cola_lightning.compare.tasks import score_tasks
from cola_lightning.errors import InputError
from cola_lightning.inference.evaluate import find_tasks
from cola_lightning.output_files import write_whole

RESULT, FAILED, COSTS, CONFIG, STAGE, LOG = (
    "result.json", "failed.txt", "costs.json", "trial.yaml", "stage.yaml", "output.log",
)  # fmt: skip

Command = Callable[[list[str]], None]
"""``f(args)`` runs a command of the command line, such as ``["fit", "--config=FILE"]``."""


class SweepRunner:
    """Run the trials of a plan in a folder, and read their results.

    A trial has a folder: FOLDER/METHOD/mRATE-oRATE-bBETA2-seed-SEED. In it are ``trial.yaml``, its whole configuration;
    a run ``tokens-N`` for each budget, with ``result.json``; and, if it is trained to several budgets, the run
    ``trunk``, with the checkpoints from which the others begin. A trial of the sweep has one budget and no trunk.

    Args:
        plan: The plan.
        folder: Folder of the comparison.
        threads: Threads of each process.
        command: Function that runs a command line.
        keep_checkpoints: Keep the checkpoints of finished trials, which are large.
    """

    def __init__(
        self, plan: Plan, folder: Path, threads: int, command: Command, keep_checkpoints: bool = False
    ) -> None:
        self.plan, self.root, self.keep_checkpoints = plan, folder, keep_checkpoints
        self.threads, self.command = threads, command
        self._lock = Lock()
        self._groups: dict[str, Path] | None = None

    # -- results ------------------------------------------------------------------------------------------------

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

    def outcome(self, method: str, rates: Rates) -> float | None:
        """Return the perplexity of a trial of the sweep: infinity if it failed, None if it has not ended."""
        smallest, seed = self.plan.budgets[0], self.plan.seeds[0]
        if result := self.result(method, rates, seed, smallest):
            return result["perplexity"]
        return None if self.failure(method, rates, seed) is None else math.inf

    def sweep(self, method: str) -> dict[Rates, float | None]:
        """Return the outcome of each trial of the sweep whose rates are known: the grid's, and the search's so far.

        Rates of the search follow from the plan and the outcomes before, so that an interruption changes none of them.
        """
        found = {rates: self.outcome(method, rates) for rates in self.plan.grid(method)}
        while len(found) < self.plan.sweep_trials:
            ended = {rates: value for rates, value in found.items() if value is not None}
            if len(ended) < len(found):
                break
            rates = next_rates(ended, self.plan.beta2)
            found[rates] = self.outcome(method, rates)
        return found

    def finite(self, method: str, pairs: list[Rates] | None = None) -> dict[Rates, float]:
        """Return the perplexities of the sweep, or of ``pairs``, that are numbers."""
        found = self.sweep(method) if pairs is None else {rates: self.outcome(method, rates) for rates in pairs}
        return {rates: value for rates, value in found.items() if value is not None and math.isfinite(value)}

    def best(self, method: str) -> Rates | None:
        """Return the rates with the lowest perplexity in the sweep; None if no run ended with a finite one."""
        finite = self.finite(method)
        return best_rates(finite) if finite else None

    def check(self) -> None:
        """Refuse a plan that cannot work, or a folder with trials of other settings, before anything runs."""
        for method in self.plan.methods:
            for rates in self.plan.grid(method):
                self._configuration(method, rates, self.plan.seeds[0])
            if len(self.plan.budgets) > 1:
                for budget in self.plan.budgets:
                    self.plan.trunk_steps(method, budget)
        if self.plan.held_out:
            self._held_out_files()
        if self.plan.include_path is not None and not Path(self.plan.include_path).is_dir():
            raise InputError(f"include_path {self.plan.include_path} is no folder; name one with task files")
        if self.plan.tasks:
            find_tasks(self.plan.tasks, self.plan.include_path)

    def _configuration(self, method: str, rates: Rates, seed: int) -> dict[str, Any]:
        folder = self.folder(method, rates, seed)
        config = self.plan.configuration(method, rates, seed)
        begun = folder / CONFIG
        if begun.is_file() and (different := _difference(yaml.safe_load(begun.read_text()), config)):
            raise InputError(
                f"{folder} was begun with another {different} than the plan has now; choose another --folder, or "
                f"delete that one"
            )
        return config

    def _held_out_files(self) -> dict[str, Path]:
        with self._lock:
            self._groups = self._groups or self._split_held_out()
            return self._groups

    def _split_held_out(self) -> dict[str, Path]:
        data = self.plan.configuration(self.plan.baseline, Rates(1, 1), 0)["data"]["init_args"]
        if not (paths := data.get("validation_paths")):
            raise InputError("held_out needs data.validation_paths, whose documents it tells apart; set them")
        assert self.plan.held_out
        return split_by_source(paths, data.get("text_column", "text"), self.plan.held_out, self.root / "held_out")

    # -- running ------------------------------------------------------------------------------------------------------

    def rates(self, trial: Trial) -> Rates | None:
        """Return the rates of a trial; None if trials before it have not ended, or the sweep has no best."""
        if trial.kind == "search":
            known = list(self.sweep(trial.method))[len(self.plan.grid(trial.method)) :]
            return known[trial.place] if trial.place < len(known) else None
        if trial.matrix is None:
            return self.best(trial.method)
        if trial.other is None:
            return next(rates for rates in self.plan.published_rates(trial.method) if rates.matrix == trial.matrix)
        return Rates(trial.matrix, trial.other, self.plan.first_beta2)

    def run(self, trial: Trial) -> str:
        """Run a trial unless it is finished, and describe the outcome in a few words."""
        plan, method, seed = self.plan, trial.method, trial.seed
        rates = self.rates(trial)
        if rates is None:
            return "skipped, because no run of the sweep ended with a number"
        config = self._configuration(method, rates, seed)
        if trial.kind == "grid" and rates == plan.grid(method)[0]:
            self.count(method)
        result, made = None, False
        for budget in plan.budgets if trial.kind == "seed" else plan.budgets[:1]:
            result = self.result(method, rates, seed, budget)
            if result is None:
                several = trial.kind == "seed" and len(plan.budgets) > 1
                result, made = self._train(method, rates, seed, budget, config, several), True
            if result is None:
                return f"failed, see {self.folder(method, rates, seed) / FAILED}"
        if trial.kind == "seed" and not self.keep_checkpoints:
            shutil.rmtree(self.folder(method, rates, seed) / "trunk" / "checkpoints", ignore_errors=True)
        assert result
        which = f"{rates.title}: " if trial.matrix is None else ""
        return which + (f"perplexity {result['perplexity']:.2f}" if made else "finished before")

    def _train(
        self, method: str, rates: Rates, seed: int, budget: int, config: dict[str, Any], several: bool
    ) -> dict[str, Any] | None:
        """Train to a budget, by way of the trunk if ``several`` budgets are due. Return None if that failed."""
        folder, run_dir = self.folder(method, rates, seed), self.run_dir(method, rates, seed, budget)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILED).unlink(missing_ok=True)
        write_whole(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
        steps, trunk, trunk_steps = self.plan.steps(method, budget), None, 0
        if several:
            trunk, trunk_steps = folder / "trunk", self.plan.trunk_steps(method, budget)
            # A run that was killed in its decay resumes from its own checkpoint and needs no trunk.
            resumes = (run_dir / "checkpoints" / LINK).is_file()
            if not resumes and (status := self._train_trunk(trunk, trunk_steps, config)):
                return self._fail(folder, trunk, status)
        start = trunk / "checkpoints" / checkpoint_name(trunk_steps) if trunk else None
        if status := self._fit(run_dir, steps, config, start):
            return self._fail(folder, run_dir, status)
        result = read_outcome(run_dir, steps, trunk, trunk_steps)
        if result is None:
            return self._fail(folder, run_dir, 0)
        result["by_source"], result["tasks"] = {}, {}
        if budget == self.plan.budgets[-1] and (status := self._measure(run_dir, config, result)):
            return self._fail(folder, run_dir, status)
        result |= {"method": method, "matrix": rates.matrix, "other": rates.other, "seed": seed, "budget": budget}
        self._check_data(folder, result)
        write(run_dir / RESULT, result)
        if not self.keep_checkpoints:
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        return result

    def _measure(self, run_dir: Path, config: dict[str, Any], result: dict[str, Any]) -> int:
        """Add perplexities by source and scores of tasks to a result, if the plan has any. Return the exit status."""
        plan = self.plan
        accelerator, precision = (str(config["trainer"][name]) for name in ("accelerator", "precision"))
        steps: list[tuple[str, type, Callable[..., None], tuple[Any, ...]]] = []
        if plan.held_out:
            files = {name: str(file) for name, file in self._held_out_files().items()}
            arguments: tuple[Any, ...] = (str(run_dir), files, accelerator, "bf16" in precision)
            steps.append(("by_source", dict[str, float], evaluate_sources, arguments))
        if plan.tasks:
            arguments = (str(run_dir), plan.tasks, plan.include_path, accelerator)
            steps.append(("tasks", dict[str, dict[str, float]], score_tasks, arguments))
        for name, kind, function, arguments in steps:
            file = run_dir / f"{name}.json"
            if status := run(function, (*arguments, str(file)), run_dir / LOG, self.threads):
                return status
            result[name] = read(file, kind)
        return 0

    def _train_trunk(self, trunk: Path, steps: int, config: dict[str, Any]) -> int:
        """Train with the constant rate up to a step and save a checkpoint there. Return the exit status."""
        checkpoint = trunk / "checkpoints" / checkpoint_name(steps)
        if checkpoint.exists():
            return 0
        newest = next(iter(written(trunk / "checkpoints")), None)
        if newest is not None and newest.name > checkpoint.name:  # of a larger budget; this step's checkpoint is gone
            shutil.rmtree(trunk)
        constant = deepcopy(config)
        constant["model"]["schedule"]["init_args"]["decay_share"] = 0.0
        constant["trainer"]["limit_val_batches"] = 0  # only the ends of budgets are validated
        return self._fit(trunk, steps, constant) or not checkpoint.exists()

    def _fit(self, run_dir: Path, steps: int, config: dict[str, Any], start: Path | None = None) -> int:
        """Train a run to a step, from its own newest checkpoint, else from ``start``, else from step 0."""
        resumes = (run_dir / "checkpoints" / LINK).is_file()
        if not resumes:
            shutil.rmtree(run_dir, ignore_errors=True)  # it may have events, but no checkpoint to resume from
        run_dir.mkdir(parents=True, exist_ok=True)
        stage = deepcopy(config)
        stage["trainer"] |= {"max_steps": steps, "val_check_interval": steps}
        stage["run_dir"] = str(run_dir)
        write_whole(run_dir / STAGE, yaml.safe_dump(stage, sort_keys=False))
        begin = "last" if resumes else start
        flags = ["fit", f"--config={run_dir / STAGE}", *([f"--ckpt_path={begin}"] if begin else [])]
        return run(self.command, (flags,), run_dir / LOG, self.threads)

    @staticmethod
    def _fail(folder: Path, run_dir: Path, status: int) -> None:
        """Write why a run ended: its exit status or signal, and the line of its output that names the error."""
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"did not finish (exit status {status})"
        reason = reason_in((run_dir / LOG).read_text(encoding="utf-8", errors="replace"))
        write_whole(folder / FAILED, f"{run_dir.name} {how}: {reason}; see {run_dir / LOG}\n")

    def _check_data(self, folder: Path, result: dict[str, Any]) -> None:
        """Refuse a result on other text than that of the runs that are finished. One of these stands for all."""
        file = next(self.root.glob(f"*/*/*/{RESULT}"), None)
        if file and (other := read(file, StoredResult)) and other["data"] != result["data"]:
            raise InputError(
                f"{folder} was trained on other text than {file.parent}: the files changed between the two; choose "
                f"another --folder, or delete the runs on the old text"
            )

    def prepare_data(self) -> None:
        """Let the data module make its cache, so that trials that run at a time do not all make it.

        If that fails, the trials fail as well, and say why.
        """
        data = self.plan.configuration(self.plan.baseline, Rates(1, 1), 0)["data"]
        self.root.mkdir(parents=True, exist_ok=True)
        run(prepare_data, (data,), self.root / "data.log", self.threads)

    def count(self, method: str) -> None:
        """Count FLOPs and bytes of a method, unless they are known.

        If that fails, the table has gaps, and a warning says where to look.
        """
        if self.costs(method) is not None:
            return
        config = self._configuration(method, self.plan.grid(method)[0], self.plan.seeds[0])
        folder = self.root / folder_name(method)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {name: config[name] for name in ("trainer", "model", "data")}  # without those of fit alone
        write_whole(folder / "costs.yaml", yaml.safe_dump(settings, sort_keys=False))
        flags = ["benchmark", f"--json={folder / COSTS}", "--warmup=0", "--rounds=1", "--steps=1"]
        flags += [f"--config={folder / 'costs.yaml'}", "--trainer.logger=false"]
        if run(self.command, (flags,), folder / "costs.log", self.threads):
            rank_zero_warn(f"FLOPs and memory of {method} could not be counted, see {folder / 'costs.log'}")


def prepare_data(settings: dict[str, Any]) -> None:
    """Make the cache of a data module.

    Args:
        settings: ``class_path`` and ``init_args``.
    """
    instantiate_class((), settings).prepare_data()


def reason_in(log: str) -> str:
    """Return the last line of an output that names an error, else the last line."""
    lines = log.strip().splitlines() or [""]
    return next((line for line in reversed(lines) if re.match(r"error: |[\w.]*(Error|Exception)\b", line)), lines[-1])


def _difference(old: Any, new: Any) -> str:
    """Name the first setting in which two configurations differ; empty if there is none."""
    old, new = flatten(old), flatten(new)
    return next((key for key in {**old, **new} if old.get(key) != new.get(key)), "")
