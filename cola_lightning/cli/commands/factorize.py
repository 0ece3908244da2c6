"""Make a low-rank model from a dense one, by truncated singular value decomposition."""

from typing import Any

from cola_lightning.cli.help_pages import FunctionHelp, show_if_asked
from cola_lightning.light_import import import_lightning

GROUP = "Use"
EXAMPLE = "models/llama models/cola --projection CoLA --projection.rank 16"


def help_page() -> FunctionHelp:
    """Make the help of the command."""
    return FunctionHelp(
        "factorize",
        EXAMPLE,
        "inference/factorize.py:factorize",
        as_positional=True,
        more="--projection.help lists the low-rank methods, --projection.help CoLA the options of one.",
    )


def parse(args: list[str]) -> dict[str, Any]:
    """Parse the arguments of :func:`cola_lightning.inference.factorize.factorize`."""
    show_if_asked(help_page, args)
    import_lightning()
    from cola_lightning.cli.parser import parse_function
    from cola_lightning.inference.factorize import factorize

    return parse_function(factorize, "factorize", EXAMPLE, args)


def run(options: dict[str, Any]) -> None:
    """Write the folder of the low-rank model."""
    from cola_lightning.inference.factorize import factorize

    factorize(**options)
