"""Time training steps."""

import statistics
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress
from torch.profiler import ProfilerActivity, profile, record_function

from cola_lightning.benchmark.clock import Clock
from cola_lightning.benchmark.counting import count
from cola_lightning.benchmark.targets import BenchmarkTarget

Target = TypeVar("Target", bound=BenchmarkTarget)
PARTS = ("data", "forward", "backward", "optimizer")


def turns(subjects: Sequence[Target], rounds: int) -> Iterator[tuple[int, Target]]:
    """Yield the number of a round and the subject that is measured next, which is built by then, under a progress bar.

    On a CPU all subjects take turns in every round, so that other work on the machine disturbs all of them alike. A GPU
    runs one program at a steady speed. There each subject is alone, so that its memory can be measured.
    """
    alone = subjects[0].device.type == "cuda"
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=rounds * len(subjects))
        for group in [[subject] for subject in subjects] if alone else [subjects]:
            for subject in group:
                subject.build()
            for number, subject in product(range(rounds), group):
                progress.update(task, description=subject.name)
                yield number, subject
                progress.advance(task)
            for subject in group:
                subject.release()


def measure_training(
    subjects: list[BenchmarkTarget], warmup: int, rounds: int, steps: int, folder: str | None = None
) -> list[dict[str, Any]]:
    """Time steps of every subject, after counting what they do.

    Args:
        subjects: The networks.
        warmup: Steps that are not timed, before a subject's first turn.
        rounds: Turns of every subject.
        steps: Timed steps of a turn.
        folder: Folder for a trace of each subject's steps.

    Returns:
        For each subject what :func:`count` returns; ``tokens_per_second`` of each round, by its median step;
        ``seconds``, the median of a step and of its parts (``data`` is the copy of a batch from host memory to the
        device); ``peak_memory_bytes`` of the allocator on CUDA, else None.
    """
    results: dict[str, dict[str, Any]] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    for number, subject in turns(subjects, rounds):
        if not number:
            results[subject.name] = {"name": subject.name, "batch": list(subject.shape), "tokens_per_second": []}
            results[subject.name] |= count(subject)
            seconds[subject.name] = {part: [] for part in ("step", *PARTS)}
            for _ in range(warmup):
                subject.step()
            subject.reset_peak_memory()
        result, found = results[subject.name], _time(subject, steps)
        for part, values in found.items():
            seconds[subject.name][part] += values
        tokens = subject.shape[0] * subject.shape[1]
        result["tokens_per_second"].append(tokens / statistics.median(found["step"]))
        if number == rounds - 1:
            result["peak_memory_bytes"] = subject.peak_memory()
            result["seconds"] = {part: statistics.median(v) for part, v in seconds[subject.name].items()}
            if folder:
                _trace(subject, Path(folder))
    return list(results.values())


def _time(subject: BenchmarkTarget, steps: int) -> dict[str, list[float]]:
    clock = Clock(subject.device)
    clock.mark("")
    for _ in range(steps):
        subject.step(clock.mark)
    times = clock.read()
    found = {part: [value for name, value in times if name == part] for part in PARTS}
    return found | {"step": [sum(each) for each in zip(*found.values(), strict=True)]}


def _trace(subject: BenchmarkTarget, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (subject.device.type == "cuda")
    with profile(activities=activities, profile_memory=True) as profiler:
        for _ in range(2):
            with record_function("step"):
                subject.step()
    name = "".join(letter if letter.isalnum() or letter in "+-_." else "_" for letter in subject.name)
    profiler.export_chrome_trace(str(folder / f"{name}.pt.trace.json"))
