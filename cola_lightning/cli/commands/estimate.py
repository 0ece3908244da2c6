"""Predict what a run will cost: parameters, FLOPs, memory, speed, days."""

from argparse import Namespace

from cola_lightning.cli.options import OptionParser
from cola_lightning.errors import InputError
from cola_lightning.output_files import check_output_file

GROUP = "Look"


def parse(args: list[str]) -> tuple[Namespace, list[str]]:
    """Parse the command's own options; the rest are those of ``fit``.

    Raises:
        InputError: If one is out of range, or the file cannot be written.
    """
    parser = OptionParser(
        "estimate",
        "--config configs/cola_1b.yaml --gpus 8 --gpu h100",
        description="Predict what a run will cost, and how fast it is. Besides these options it takes those of fit, "
        "--config above all; it needs neither the data nor the devices.",
    )
    add = parser.add_argument
    add("--gpus", help="number of GPUs; 1..1024 for a table of scaling; else --trainer.devices times num_nodes, or 1")
    add("--plot", metavar="FILE", help="draw the table of --gpus 1..1024; needs matplotlib")
    add("--gpu", default="h100", help="kind of GPU: a100-80, h100, h200, l40s, …; or cpu, which is measured")
    add("--network", default="infiniband", help="between nodes of 8: infiniband (NDR), infiniband-hdr or ethernet")
    add("--mfu", type=float, help="share of the GPUs' peak that is reached, 0 to 1; else it is predicted")
    add("--json", metavar="FILE", help="write the result there too")
    add("--models", nargs="+", default=[], metavar="FILE", help="several configs, in one table")
    options, rest = parser.parse_known_args(args)
    options.gpus = numbers_of_gpus(options.gpus) if options.gpus else []
    if options.gpu == "cpu" and max(options.gpus, default=1) > 1:
        raise InputError("--gpu cpu predicts one process; leave --gpus out, or name a kind of GPU")
    if options.plot and len(options.gpus) < 2:
        raise InputError("--plot draws the speed over numbers of GPUs; give several, as in --gpus 1..1024")
    if options.models and len(options.gpus) > 1:
        raise InputError("--models compares configs on one number of GPUs; give --gpus a single number")
    check_output_file(options.plot, "--plot")
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise InputError(f"--mfu is {options.mfu}; it must be above 0 and at most 1")
    check_output_file(options.json)
    return options, rest


def run(parsed: tuple[Namespace, list[str]]) -> None:
    """Print the tables of each config."""
    from cola_lightning.cli.lightning_cli import Settings
    from cola_lightning.costs.plan import plan
    from cola_lightning.costs.report import report

    options, rest = parsed
    flags = [[f"--config={file}", *rest] for file in options.models] or [rest]
    settings = [Settings(each, run=False) for each in flags]
    gpus = options.gpus[0] if options.gpus else None
    plans = [plan(each.model, each.datamodule, each.trainer, gpus) for each in settings]
    report(plans, options.models, options.gpu, options.mfu, options.json, options.network)
    if len(options.gpus) > 1:
        from cola_lightning.costs.scaling import report_scaling

        report_scaling(plans[0].run, options.gpu, options.network, options.gpus, options.plot)


def numbers_of_gpus(bounds: str) -> list[int]:
    """Return the powers of two between two numbers, and both. Example: ``1..1024``, or ``6..24`` for 6, 8, 16, 24.

    Raises:
        InputError: If ``bounds`` is not a number, or two joined by ``..``, from small to large.
    """
    parts = bounds.split("..")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--gpus is {bounds}; give a number from 1 up, or two as in 1..1024")
    first, last = int(parts[0]), int(parts[-1])
    if first > last:
        raise InputError(f"--gpus is {bounds}; the first number must not be above the second")
    between = (2**power for power in range(first.bit_length(), last.bit_length()))
    return sorted({first, last, *(number for number in between if first < number < last)})
