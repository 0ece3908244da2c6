"""The command ``compare``."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cola_lightning.cli.parser import Parser
from cola_lightning.compare.plan import Flag, Method, Plan, Resolve, Trial
from cola_lightning.compare.report import write_report
from cola_lightning.compare.trials import SweepRunner
from cola_lightning.errors import InputError


def main(args: list[str], resolve: Resolve) -> None:
    """The arguments of :func:`compare`, as flags or in a file named by ``--config``."""
    parser = Parser(prog="cola_lightning compare")
    parser.add_argument("-c", "--config", action="config", help="The plan, a YAML file.")
    parser.add_function_arguments(compare, as_group=False, skip={"resolve"})
    options = parser.instantiate_classes(parser.parse_args(args))
    del options["config"]
    compare(resolve, **options)


def compare(
    resolve: Resolve,
    methods: dict[str, Method],
    folder: str,
    configs: list[str] | None = None,
    flags: dict[str, Flag] | None = None,
    learning_rates: list[float] | None = None,
    seeds: list[int] | None = None,
    jobs: int = 1,
    trial: int | None = None,
    report: str | None = None,
    keep_checkpoints: bool = False,
) -> None:
    """Train every method with every learning rate, the best of each with more seeds, and write a table and plots.

    Run again after a break, it keeps what has finished and goes on with what has not, failed runs included, from
    their checkpoints.

    Args:
        resolve: Makes a whole configuration of the flags of ``fit``.
        methods: What is compared, by name.
        folder: Where runs and results go.
        configs: Configs that all methods build on.
        flags: What comes on top of all files and methods' own flags, as on the command line.
        learning_rates: Factors of the learning rate that a method's own files give, tried for every method;
            [0.3, 1, 3] if not given.
        seeds: The first is the sweep's; the others are for the best learning rate only. [42, 43] if not given.
        jobs: Runs at a time, which share the cores; 0 to train nothing and write the report of what is there.
        trial: Number of the only trial to carry out, from 0, for array jobs: first the learning rates of each
            method, then its further seeds. No report is written.
        report: Folder of the table and the plots; "report" in the folder if not given.
        keep_checkpoints: Leave the checkpoints of finished runs.

    Raises:
        InputError: For values that cannot work.
    """
    if jobs < 0:
        raise InputError(f"jobs is {jobs}; it must be 0 or more")
    root = Path(folder).expanduser().absolute()
    plan = Plan(configs or [], flags or {}, methods, learning_rates or [0.3, 1, 3], seeds or [42, 43], resolve)
    runner = SweepRunner(plan, root, max(1, (os.cpu_count() or 1) // max(1, jobs)), keep_checkpoints)
    if trial is not None:
        run_one(runner, trial)
        return
    if jobs:
        runner.check()
        run_all(runner, jobs)
    write_report(runner, Path(report) if report else root / "report")


def run_one(runner: SweepRunner, number: int) -> None:
    trials = runner.plan.trials
    if not 0 <= number < len(trials):
        raise InputError(f"trial is {number}; the plan has trials 0 to {len(trials) - 1}")
    trial = trials[number]
    if trial.factor is None:
        for other in trials:
            done = other.factor is None or runner.result(trial.method, other.factor, other.seed)
            failed = other.factor is not None and runner.failure(trial.method, other.factor, other.seed)
            if other.method == trial.method and not done and not failed:
                raise InputError(
                    f"trial {number} is {trial.method} at its best learning rate; run trial {other.number} first"
                )
    print(f"{title(trial)}: {runner.run(trial)}")


def run_all(runner: SweepRunner, jobs: int) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    trials = runner.plan.trials
    running: list[str] = []
    lock = Lock()
    with Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("", total=len(trials))

        def run(trial: Trial) -> None:
            with lock:
                running.append(title(trial))
                progress.update(task, description=" | ".join(running))
            word = runner.run(trial)
            with lock:
                running.remove(title(trial))
                progress.update(task, advance=1, description=" | ".join(running))
            progress.print(f"{title(trial)}: {word}", markup=False, highlight=False)

        try:
            run(trials[0])  # alone, for it may have data to prepare, which the others then find
            # The best learning rates are known when the sweep is over.
            list(pool.map(run, [trial for trial in trials[1:] if trial.factor is not None]))
            list(pool.map(run, [trial for trial in trials[1:] if trial.factor is None]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def title(trial: Trial) -> str:
    rate = "best learning rate" if trial.factor is None else f"learning rate x {trial.factor:g}"
    return f"{trial.method}, {rate}, seed {trial.seed}"
