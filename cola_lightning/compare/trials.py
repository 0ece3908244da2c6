"""Carrying trials out: each is a process of its own, leaves its result in a file, and goes on where it broke off."""

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Len
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typing_extensions import TypedDict

from cola_lightning.compare.plan import Plan, Trial, folder_name, learning_rates
from cola_lightning.compare.processes import run
from cola_lightning.errors import InputError
from cola_lightning.provenance import commit, read_provenance
from cola_lightning.stored_data import Count, check_stored

RESULT, FAILED, COSTS, CONFIG, LOG = "result.json", "failed.txt", "costs.json", "trial.yaml", "output.log"


class SweepRunner:
    """Where trials are carried out.

    Args:
        plan: What they are.
        folder: Of this comparison; a folder for each method and trial in it.
        threads: Of each process.
        keep_checkpoints: Leave a trial's checkpoints when it has finished; they are large.
    """

    def __init__(self, plan: Plan, folder: Path, threads: int, keep_checkpoints: bool = False) -> None:
        self.plan, self.root, self.keep_checkpoints = plan, folder, keep_checkpoints
        self.threads = threads

    # -- what is there ------------------------------------------------------------------------------------------------

    def folder(self, method: str, factor: float, seed: int) -> Path:
        return self.root / folder_name(method) / f"lr-x{factor:g}-seed-{seed}"

    def result(self, method: str, factor: float, seed: int) -> dict[str, Any] | None:
        return read(self.folder(method, factor, seed) / RESULT, _Result)

    def failure(self, method: str, factor: float, seed: int) -> str | None:
        file = self.folder(method, factor, seed) / FAILED
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def costs(self, method: str) -> dict[str, Any] | None:
        measured = read(self.root / folder_name(method) / COSTS, _Costs)
        return measured and measured["subjects"][0]

    def sweep(self, method: str) -> dict[float, dict[str, Any]]:
        """The finished runs of the sweep, by factor."""
        found = {factor: self.result(method, factor, self.plan.seeds[0]) for factor in self.plan.learning_rates}
        return {factor: result for factor, result in found.items() if result}

    def best(self, method: str) -> float | None:
        """The factor with the lowest perplexity; None if none ended with a number."""
        finite = {f: r["perplexity"] for f, r in self.sweep(method).items() if math.isfinite(r["perplexity"])}
        return min(finite, key=lambda f: finite[f]) if finite else None

    def check(self) -> None:
        """Refuse what was begun with other settings, before anything is run."""
        for trial in self.plan.trials:
            if trial.factor is not None:
                self._configuration(trial.method, trial.factor, trial.seed)

    def _configuration(self, method: str, factor: float, seed: int) -> dict[str, Any]:
        folder = self.folder(method, factor, seed)
        config = self.plan.configuration(method, factor, seed, folder)
        begun = folder / CONFIG
        if begun.is_file() and (different := _difference(yaml.safe_load(begun.read_text()), config)):
            raise InputError(
                f"{folder} was begun with another {different} than the plan has now; choose another --folder, or "
                f"delete that one"
            )
        return config

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, trial: Trial) -> str:
        """Carry a trial out unless that was done; what became of it, in a word."""
        factor = self.best(trial.method) if trial.factor is None else trial.factor
        if factor is None:
            return "skipped, for no run of the sweep ended with a number"
        if trial.number % len(self.plan.learning_rates) == 0 and self.costs(trial.method) is None:
            self.measure(trial.method)
        if self.result(trial.method, factor, trial.seed):
            return "finished before"
        folder = self.folder(trial.method, factor, trial.seed)
        config = self._configuration(trial.method, factor, trial.seed)
        resumes = (folder / "checkpoints" / "last.ckpt").is_file()
        if not resumes:
            shutil.rmtree(folder, ignore_errors=True)  # events without a checkpoint to go on from
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILED).unlink(missing_ok=True)
        (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        flags = ["fit", f"--config={folder / CONFIG}", *(["--ckpt_path=last"] if resumes else [])]
        code = run(flags, folder / LOG, self.threads)
        result = None if code else outcome(folder, config)
        if result is None:
            lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            (folder / FAILED).write_text(f"exit status {code}: {lines[-1] if lines else ''}\n", encoding="utf-8")
            return f"failed, see {folder / LOG}"
        result |= {"method": trial.method, "factor": factor, "seed": trial.seed}
        self._check_data(folder, result)
        write(folder / RESULT, result)
        if not self.keep_checkpoints:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return f"perplexity {result['perplexity']:.2f}"

    def _check_data(self, folder: Path, result: dict[str, Any]) -> None:
        """Refuse a result on other text than that of a run which finished before."""
        for file in sorted(self.root.glob(f"*/*/{RESULT}")):
            if (other := read(file, _Result)) and other["data"] != result["data"]:
                raise InputError(
                    f"{folder} was trained on other text than {file.parent}: the files changed between the two; choose "
                    f"another --folder, or delete the runs on the old text"
                )

    def measure(self, method: str) -> None:
        """Count FLOPs and bytes of a method; where that fails the table has gaps, and the log says why."""
        folder = self.root / folder_name(method)
        folder.mkdir(parents=True, exist_ok=True)
        benchmark = [
            "benchmark",
            f"--json={folder / COSTS}",
            "--warmup=0",
            "--rounds=1",
            "--steps=1",
            *self.plan.flags(method),
        ]
        run([*benchmark, "--trainer.logger=false"], folder / "costs.log", self.threads)


def outcome(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What a run came to, from its events; None if it did not come to its end."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    if not {"val/perplexity", "train/loss", "train/tokens"} <= tags:
        return None
    curves = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}
    perplexity = curves["val/perplexity"]
    if max(perplexity) < config["trainer"]["max_steps"] - 1:
        return None
    tokens, loss = curves["train/tokens"], curves["train/loss"]
    speeds = list(curves.get("train/tokens_per_second", {}).values())
    return {
        "perplexity": perplexity[max(perplexity)],
        "perplexity_as_published": curves["val/perplexity_as_published"][max(perplexity)],
        "learning_rates": learning_rates(config["model"]["optimizer"]),
        "steps": config["trainer"]["max_steps"],
        "tokens": int(tokens[max(tokens)]),
        "tokens_per_second": statistics.median(speeds[1:] or speeds),
        "curve": [[step + 1, int(tokens[step]), loss[step]] for step in sorted(loss) if step in tokens],
        "commit": commit(),
        "data": [
            {key: source[key] for key in ("names", "paths", "commit", "sizes", "contents")}
            for source in (read_provenance(folder).get("data") or {}).get("sources", [])
        ],
    }


class _Result(TypedDict):
    """The result of a run, made by :func:`outcome`: the keys that are read again."""

    perplexity: float
    perplexity_as_published: float
    learning_rates: list[float]
    steps: Count
    tokens: Count
    tokens_per_second: float
    curve: list[list[float]]
    commit: str | None
    data: list[dict[str, Any]]
    method: str
    factor: float
    seed: Count


class _Costs(TypedDict):
    subjects: Annotated[list[dict[str, Any]], Len(1)]


def read(file: Path, kind: type) -> dict[str, Any] | None:
    """Read a result or costs that a comparison wrote before; None if the file is missing.

    Args:
        file: JSON.
        kind: Its shape.

    Raises:
        InputError: If it is damaged.
    """
    if not file.is_file():
        return None
    remedy = "delete the file, and it is made again"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}; {remedy}") from error
    check_stored(content, kind, file, remedy)
    return content


def write(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(content, indent=1), encoding="utf-8")
    scratch.replace(file)


def _difference(old: Any, new: Any, path: str = "") -> str:
    """Where two configurations first differ; empty if nowhere."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if found := _difference(old.get(key), new.get(key), f"{path}.{key}".lstrip(".")):
                return found
        return ""
    return "" if old == new else path
