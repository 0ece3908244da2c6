"""Train several methods side by side, and write a table and plots."""

import shlex
from typing import Any

from cola_lightning.cli.parser import parse_function

GROUP = "Compare"


def parse(args: list[str]) -> dict[str, Any]:
    """Parse the arguments of :func:`cola_lightning.compare.sweep.compare`."""
    from cola_lightning.compare.sweep import compare

    skip = {"resolve", "command", "command_line"}
    example = "--config recipes/compare_methods/plan.yaml --folder runs/compare"
    options = parse_function(compare, "compare", example, args, as_positional=False, skip=skip)
    return {"command_line": shlex.join(["python", "-m", "cola_lightning", "compare", *args]), **options}


def run(options: dict[str, Any]) -> None:
    """Train what has not been trained, and write the report."""
    from cola_lightning.cli.app import main
    from cola_lightning.cli.lightning_cli import resolve
    from cola_lightning.compare.sweep import compare

    compare(resolve, main, **options)
