"""Scores of lm-eval's tasks: of a trained model, and as means over seeds."""

import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from cola_lightning.compare.outcome import write
from cola_lightning.inference.evaluate import evaluate_tasks
from cola_lightning.inference.load import load_model_for_inference, pick_device

STANDARD_ERROR = "_stderr"
"""End of the name under which lm-eval gives the standard error of a measure."""

COUNT = "sample_len"
"""Name under which lm-eval puts the number of examples among the measures."""

Scores = dict[str, dict[str, float]]
"""By task: each measure, and under its name and ``_stderr`` its standard error, if lm-eval knows it."""


class Score(NamedTuple):
    """Mean of a measure over seeds, and the standard error of a single run, which follows from the examples."""

    mean: float
    error: float | None


def score_tasks(run_dir: str, tasks: list[str], include_path: str | None, accelerator: str, result: str) -> None:
    """Write the scores of a run's newest checkpoint.

    Args:
        run_dir: Directory of the run.
        tasks: Names of lm-eval's tasks.
        include_path: Folder with task files of one's own.
        accelerator: The run's, as the Trainer names it.
        result: JSON file to write.
    """
    trained = load_model_for_inference(run_dir)
    found = evaluate_tasks(
        trained, trained.tokenizer(), tasks, include_path, batch_size=32, device=device_of(accelerator)
    )
    write(Path(result), found)


def device_of(accelerator: str) -> torch.device:
    """Return the device of a run by the Trainer's name for it."""
    return pick_device({"gpu": "cuda", "auto": None}.get(accelerator, accelerator))


def mean_scores(runs: list[Scores]) -> dict[str, Score]:
    """Return the score of each task and measure, such as ``arc_easy acc``, over runs with different seeds.

    All seeds see the same examples, so the error that comes from the choice of examples does not shrink with more
    seeds. It is the mean of the runs' errors.
    """
    found: dict[str, Score] = {}
    for task, measures in (runs[0] if runs else {}).items():
        for measure in measures:
            if measure == COUNT or measure.endswith(STANDARD_ERROR):
                continue
            if not all(measure in run.get(task, {}) for run in runs):
                continue
            errors = [run[task].get(measure + STANDARD_ERROR) for run in runs]
            known = [error for error in errors if error is not None]
            error = statistics.mean(known) if len(known) == len(errors) else None
            found[f"{task} {measure}"] = Score(statistics.mean(run[task][measure] for run in runs), error)
    return found
