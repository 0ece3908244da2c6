"""Run trials: each run is a process of its own, writes its result to a file, and resumes after an interruption."""

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
from cola_lightning.compare.outcome import StoredResult, read, read_outcome, write
from cola_lightning.compare.plan import Trial, folder_name
from cola_lightning.compare.plan_checks import check_results_can_be_read
from cola_lightning.compare.processes import run
from cola_lightning.compare.rates import Rates, flatten
from cola_lightning.compare.results import CONFIG, COSTS, FAILED, LOG, RESULT, STAGE, TrialResults
from cola_lightning.compare.tasks import score_tasks
from cola_lightning.errors import InputError
from cola_lightning.inference.evaluate import find_tasks
from cola_lightning.output_files import write_whole

Command = Callable[[list[str]], None]
"""``f(args)`` runs a command of the command line, such as ``["fit", "--config=FILE"]``."""


class SweepRunner:
    """Run the trials of a plan in a folder.

    Args:
        results: The plan, its folder, and what has ended there.
        threads: Threads of each process.
        command: Function that runs a command line.
        keep_checkpoints: Keep the checkpoints of finished trials, which are large.
    """

    def __init__(self, results: TrialResults, threads: int, command: Command, keep_checkpoints: bool = False) -> None:
        self.results, self.plan, self.root = results, results.plan, results.root
        self.threads, self.command, self.keep_checkpoints = threads, command, keep_checkpoints
        self._lock = Lock()
        self._groups: dict[str, Path] | None = None

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
        folder = self.results.folder(method, rates, seed)
        config = self.plan.configuration(method, rates, seed)
        check_results_can_be_read(method, config)
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

    def run(self, trial: Trial) -> str:
        """Run a trial unless it is finished, and describe the outcome in a few words."""
        plan, method, seed = self.plan, trial.method, trial.seed
        rates = self.results.rates(trial)
        if rates is None:
            return "skipped, because no run of the sweep ended with a number"
        config = self._configuration(method, rates, seed)
        if trial.kind == "grid" and rates == plan.grid(method)[0]:
            self.count(method)
        result, made = None, False
        is_long = trial.kind in ("final", "seed")
        for budget in plan.budgets if is_long else plan.budgets[:1]:
            result = self.results.result(method, rates, seed, budget)
            if result is None:
                several = is_long and len(plan.budgets) > 1
                result, made = self._train(method, rates, seed, budget, config, several), True
            if result is None:
                return f"failed, see {self.results.folder(method, rates, seed) / FAILED}"
        if is_long and not self.keep_checkpoints:
            shutil.rmtree(self.results.folder(method, rates, seed) / "trunk" / "checkpoints", ignore_errors=True)
        assert result
        which = f"{rates.title}: " if trial.matrix is None else ""
        return which + (f"perplexity {result['perplexity']:.2f}" if made else "finished before")

    def _train(
        self, method: str, rates: Rates, seed: int, budget: int, config: dict[str, Any], several: bool
    ) -> dict[str, Any] | None:
        """Train to a budget, by way of the trunk if ``several`` budgets are due. Return None if that failed."""
        folder, run_dir = self.results.folder(method, rates, seed), self.results.run_dir(method, rates, seed, budget)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILED).unlink(missing_ok=True)
        write_whole(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
        steps, trunk, trunk_steps, start = self.plan.steps(method, budget), None, 0, None
        if several:
            trunk, trunk_steps = folder / "trunk", self.plan.trunk_steps(method, budget)
            # A run that was killed in its decay resumes from its own checkpoint and needs no trunk.
            resumes = (run_dir / "checkpoints" / LINK).is_file()
            start = trunk / "checkpoints" / checkpoint_name(trunk_steps)
            if not resumes and (status := self._train_trunk(trunk, trunk_steps, config)):
                return self._fail(folder, trunk, status)
            if not resumes and not start.exists():
                return self._note_failure(folder, trunk, f"ended without the checkpoint of step {trunk_steps:,}")
        if status := self._fit(run_dir, steps, config, start):
            return self._fail(folder, run_dir, status)
        try:
            result = read_outcome(run_dir, steps, trunk, trunk_steps)
        except InputError as error:
            return self._note_failure(folder, run_dir, f"has no result: {error}")
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
        return self._fit(trunk, steps, constant)

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
        """Write why a run ended: its exit status or signal, and the line of its output that names the error.

        Raises:
            InputError: If Ctrl-C ended it, because then it has not failed, and no other run should begin.
        """
        if status in (-signal.SIGINT, 128 + signal.SIGINT):
            raise InputError(f"{run_dir} was ended by Ctrl-C; run the command again to go on")
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"did not finish (exit status {status})"
        reason = reason_in((run_dir / LOG).read_text(encoding="utf-8", errors="replace"))
        SweepRunner._note_failure(folder, run_dir, f"{how}: {reason}")

    @staticmethod
    def _note_failure(folder: Path, run_dir: Path, what: str) -> None:
        write_whole(folder / FAILED, f"{run_dir.name} {what}; see {run_dir / LOG}\n")

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
        if self.results.costs(method) is not None:
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
