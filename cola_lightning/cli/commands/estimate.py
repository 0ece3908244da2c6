"""Predict what a run will cost: parameters, FLOPs, memory, speed, days."""

from argparse import Namespace

from cola_lightning.cli.options import OptionParser, check_at_least
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
    add("--gpus", type=int, help="number of GPUs; else --trainer.devices times num_nodes, or 1")
    add("--gpu", default="h100", help="kind of GPU: a100-80, h100, h200, b200, l40s, rtx4090, …")
    add("--network", default="infiniband", help="between nodes of 8: infiniband (NDR), infiniband-hdr or ethernet")
    add("--mfu", type=float, help="share of the GPUs' peak that is reached, 0 to 1; else it is predicted")
    add("--json", metavar="FILE", help="write the result there too")
    add("--models", nargs="+", default=[], metavar="FILE", help="several configs, in one table")
    options, rest = parser.parse_known_args(args)
    check_at_least(1, options, "gpus")
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
    plans = [plan(each.model, each.datamodule, each.trainer, options.gpus) for each in settings]
    report(plans, options.models, options.gpu, options.mfu, options.json, options.network)
