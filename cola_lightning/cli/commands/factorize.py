"""Make a low-rank model from a dense one, by truncated singular value decomposition."""

from typing import Any

from cola_lightning.cli.parser import parse_function

GROUP = "Use"


def parse(args: list[str]) -> dict[str, Any]:
    """Parse the arguments of :func:`cola_lightning.inference.factorize.factorize`."""
    from cola_lightning.inference.factorize import factorize

    return parse_function(
        factorize, "factorize", "models/llama models/cola --projection CoLA --projection.rank 16", args
    )


def run(options: dict[str, Any]) -> None:
    """Write the folder of the low-rank model."""
    from cola_lightning.inference.factorize import factorize

    factorize(**options)
