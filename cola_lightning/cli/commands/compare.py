"""Train several methods side by side, and write a table and plots."""

import shlex
from typing import Any

from cola_lightning.cli.help_pages import FunctionHelp, show_if_asked
from cola_lightning.light_import import import_lightning

GROUP = "Compare"
EXAMPLE = "--config recipes/compare_methods/plan.yaml --folder runs/compare"
NOT_TYPED = ("resolve", "command", "command_line")
"""Arguments of :func:`cola_lightning.compare.sweep.compare` that :func:`run` gives."""


def help_page() -> FunctionHelp:
    """Make the help of the command."""
    return FunctionHelp(
        "compare",
        EXAMPLE,
        "compare/sweep.py:compare",
        skip=NOT_TYPED,
        more="--methods.help shows the settings of a method, --held_out.help those of the groups.",
    )


def parse(args: list[str]) -> dict[str, Any]:
    """Parse the arguments of :func:`cola_lightning.compare.sweep.compare`."""
    show_if_asked(help_page, args)
    import_lightning()
    from cola_lightning.cli.parser import parse_function
    from cola_lightning.compare.sweep import compare

    options = parse_function(compare, "compare", EXAMPLE, args, as_positional=False, skip=NOT_TYPED)
    return {"command_line": shlex.join(["python", "-m", "cola_lightning", "compare", *args]), **options}


def run(options: dict[str, Any]) -> None:
    """Train what has not been trained, and write the report."""
    import cola_lightning.benchmark
    import cola_lightning.cli.commands.benchmark  # noqa: F401, so that the server of processes has it
    from cola_lightning.cli.app import main
    from cola_lightning.cli.lightning_cli import resolve
    from cola_lightning.compare.sweep import compare

    compare(resolve, main, **options)
