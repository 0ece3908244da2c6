"""Run a comparison: sweep two learning rates for every method, train the best with all seeds, and report."""

import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from heapq import heappop, heappush
from pathlib import Path
from threading import Lock

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cola_lightning.compare.estimate import print_estimate
from cola_lightning.compare.plan import KINDS, Flag, HeldOut, Method, Plan, Resolve, Trial
from cola_lightning.compare.processes import start_server
from cola_lightning.compare.report import write_report
from cola_lightning.compare.results import TrialResults
from cola_lightning.compare.trials import Command, SweepRunner
from cola_lightning.errors import InputError, check_at_least


def compare(
    resolve: Resolve,
    command: Command,
    command_line: str,
    methods: dict[str, Method],
    matrix_rates: list[float],
    other_rates: list[float],
    folder: str,
    configs: list[str] | None = None,
    flags: dict[str, Flag] | None = None,
    seeds: list[int] | None = None,
    budgets: list[int] | None = None,
    weight_decay: float | None = None,
    search_trials: int = 0,
    beta2: list[float] | None = None,
    finalists: int = 1,
    published: bool = False,
    baseline: str | None = None,
    held_out: HeldOut | None = None,
    tasks: list[str] | None = None,
    include_path: str | None = None,
    only: list[str] | None = None,
    jobs: int = 1,
    threads: int | None = None,
    trial: int | None = None,
    report: str | None = None,
    keep_checkpoints: bool = False,
    tokens_per_second: float | None = None,
) -> None:
    """Sweep two learning rates for every method, train the best of each with more seeds to all budgets, and report.

    After an interruption, the same command keeps finished trials and resumes the others from their checkpoints. Failed
    trials are tried again.

    Args:
        resolve: Makes a whole configuration of the flags of ``fit``.
        command: Runs a command line of this package.
        command_line: What was typed, for the report.
        methods: The methods that are compared, by name.
        matrix_rates: Learning rates of the projections' matrices that are tried. A method may name as many others.
        other_rates: Learning rates of all other parameters (embedding, head, norms) that are tried.
        folder: Folder of runs and results.
        configs: Configs that all methods share.
        flags: Settings after all configs and all methods' flags, as on the command line.
        seeds: The sweep and the finalists have the first; the best pair of rates is trained with all. If not given,
            [42, 43, 44].
        budgets: Numbers of tokens. The sweep has the smallest. Several need the schedule WarmupStableDecay; then one
            run with a constant rate serves all of them, and each ends with a decay of its own. If not given, one: that
            of trainer.max_steps.
        weight_decay: Weight decay of all parameters of all methods; if not given, each has that of its files.
        search_trials: Trials of each method after the grid, one after another, each a neighbor of the best so far:
            first one beyond the lowest or the highest rate, if the best has it.
        beta2: Values of β2 (decay rate of Adam's second moment) that are tried for all parameters; the grid has the
            first, the search the others. If not given, each method has that of its files.
        finalists: Trials of each method at all budgets with the first seed, one after another: the best of the sweep,
            then neighbors of the best so far at the largest budget. The best there is the method's.
        published: Also try the ratio of the two rates that each method's own files have, as many trials as
            matrix_rates.
        baseline: The method with which others are compared; the first if not given.
        held_out: Groups of the validation documents, for perplexity by source.
        tasks: Names of lm-eval's tasks, which score each method at the largest budget; needs the extra "eval".
        include_path: Folder with task files of one's own.
        only: The methods of the plan to train and report now; all if not given. The others can follow in the same
            folder.
        jobs: Runs at a time, which share the cores; 0 to train nothing and write the report of what is there.
        threads: Threads of a run; the cores shared among the jobs if not given. Results depend on it in their last
            bits.
        trial: Number of the only trial to carry out, from 0, for array jobs: first the grids of all methods, then
            the first further trial of each, the second …, the published ratios, the finalists, and the seeds. No report
            is written.
        report: Folder of the report; "report" in the folder if not given.
        keep_checkpoints: Leave the checkpoints of finished runs.
        tokens_per_second: Train nothing, and print how long the plan takes at this speed of the baseline.

    Raises:
        InputError: For values that cannot work.
    """
    check_at_least(0, jobs=jobs)
    check_at_least(1, threads=threads)
    if jobs and tokens_per_second is None:
        start_server(["lm_eval.models.huggingface"] if tasks else [])
    root = Path(folder).expanduser().absolute()
    if only is not None:
        if unknown := [name for name in only if name not in methods]:
            raise InputError(f"only names {unknown}, not of the plan's methods {list(methods)}")
        methods = {name: method for name, method in methods.items() if name in only}
    plan = Plan(
        configs or [], flags or {}, methods, matrix_rates, other_rates, seeds or [42, 43, 44], resolve, budgets,
        weight_decay, search_trials, beta2, finalists, published, baseline, held_out, tasks, include_path,
    )  # fmt: skip
    share = threads or max(1, (os.cpu_count() or 1) // max(1, jobs))
    results = TrialResults(plan, root)
    runner = SweepRunner(results, share, command, keep_checkpoints)
    if tokens_per_second is not None:
        print_estimate(plan, tokens_per_second, jobs)
        return
    if trial is not None:
        run_one(runner, trial)
        return
    if jobs:
        runner.check()
        run_all(runner, jobs)
    write_report(results, Path(report) if report else root / "report", command_line, share)


def run_one(runner: SweepRunner, number: int) -> None:
    """Run the trial with a number.

    Raises:
        InputError: If there is no such trial, or it needs the best rates of a sweep that is not finished.
    """
    trials = runner.plan.trials
    if not 0 <= number < len(trials):
        raise InputError(f"trial is {number}; the plan has trials 0 to {len(trials) - 1}")
    trial = trials[number]
    if trial.kind in ("search", "final", "seed"):
        before = ("grid", "search", "final") if trial.kind == "seed" else ("grid", "search")
        for other in trials[:number]:
            if other.method == trial.method and other.kind in before and not runner.results.has_ended(other):
                raise InputError(f"trial {number} is {trial.title}; run trial {other.number} first")
    print(f"{trial.title}: {runner.run(trial)}")


def run_all(runner: SweepRunner, jobs: int) -> None:
    """Run all trials, ``jobs`` at a time, in the order of their numbers as far as each can begin."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    trials = runner.plan.trials
    running: list[str] = []
    lock = Lock()
    with Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("", total=len(trials))

        def run(trial: Trial) -> Trial:
            with lock:
                running.append(trial.title)
                progress.update(task, description=" | ".join(running))
            outcome = runner.run(trial)
            with lock:
                running.remove(trial.title)
                progress.update(task, advance=1, description=" | ".join(running))
            progress.print(f"{trial.title}: {outcome}", markup=False, highlight=False)
            return trial

        # Of one method, each stage needs the one before: a further trial the outcomes so far, a published pair the
        # grid, which it may be part of, the finalists the sweep, and the seeds the best finalist.
        stages = {method: _stages(trials, method) for method in runner.plan.methods}
        left: dict[str, int] = {}
        ready: list[tuple[int, Trial]] = []
        pending: set[Future[Trial]] = set()

        def begin_stage(method: str) -> None:
            stage = next(stages[method], [])
            left[method] = len(stage)
            for trial in stage:
                heappush(ready, (trial.number, trial))

        try:
            runner.prepare_data()
            for method in runner.plan.methods:
                begin_stage(method)
            while ready or pending:
                while ready and len(pending) < jobs:
                    pending.add(pool.submit(run, heappop(ready)[1]))
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for method in [future.result().method for future in done]:
                    left[method] -= 1
                    if not left[method]:
                        begin_stage(method)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _stages(trials: list[Trial], method: str) -> Iterator[list[Trial]]:
    """Yield the trials of a method by their kinds; those of the search, and the finalists, one by one."""
    for kind in KINDS:
        stage = [trial for trial in trials if trial.method == method and trial.kind == kind]
        yield from ([trial] for trial in stage) if kind in ("search", "final") else [stage] if stage else []
