"""The verb ``compare``."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cola_lightning.compare.cells import Bench
from cola_lightning.compare.plan import Cell, Flag, Method, Plan, Resolve
from cola_lightning.compare.report import write_report
from cola_lightning.errors import InputError
from cola_lightning.parser import Parser


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
    cell: int | None = None,
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
        configs: Run files that all methods build on.
        flags: What comes on top of all files and methods' own flags, as on the command line.
        learning_rates: Factors of the learning rate that a method's own files give, tried for every method;
            [0.3, 1, 3] if not given.
        seeds: The first is the sweep's; the others are for the best learning rate only. [42, 43] if not given.
        jobs: Runs at a time, which share the cores; 0 to train nothing and write the report of what is there.
        cell: Number of the only cell to carry out, from 0, for array jobs: first the learning rates of each
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
    bench = Bench(plan, root, max(1, (os.cpu_count() or 1) // max(1, jobs)), keep_checkpoints)
    if cell is not None:
        run_one(bench, cell)
        return
    if jobs:
        bench.check()
        run_all(bench, jobs)
    write_report(bench, Path(report) if report else root / "report")


def run_one(bench: Bench, number: int) -> None:
    cells = bench.plan.cells
    if not 0 <= number < len(cells):
        raise InputError(f"cell is {number}; the plan has cells 0 to {len(cells) - 1}")
    cell = cells[number]
    if cell.factor is None:
        for other in cells:
            done = other.factor is None or bench.result(cell.method, other.factor, other.seed)
            failed = other.factor is not None and bench.failure(cell.method, other.factor, other.seed)
            if other.method == cell.method and not done and not failed:
                raise InputError(
                    f"cell {number} is {cell.method} at its best learning rate; run cell {other.number} first"
                )
    print(f"{title(cell)}: {bench.run(cell)}")


def run_all(bench: Bench, jobs: int) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    cells = bench.plan.cells
    running: list[str] = []
    lock = Lock()
    with Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("", total=len(cells))

        def run(cell: Cell) -> None:
            with lock:
                running.append(title(cell))
                progress.update(task, description=" | ".join(running))
            word = bench.run(cell)
            with lock:
                running.remove(title(cell))
                progress.update(task, advance=1, description=" | ".join(running))
            progress.print(f"{title(cell)}: {word}", markup=False, highlight=False)

        try:
            run(cells[0])  # alone, for it may have data to prepare, which the others then find
            # The best learning rates are known when the sweep is over.
            list(pool.map(run, [cell for cell in cells[1:] if cell.factor is not None]))
            list(pool.map(run, [cell for cell in cells[1:] if cell.factor is None]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def title(cell: Cell) -> str:
    rate = "best learning rate" if cell.factor is None else f"learning rate x {cell.factor:g}"
    return f"{cell.method}, {rate}, seed {cell.seed}"
