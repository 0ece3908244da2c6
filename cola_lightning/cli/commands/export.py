"""Write a model as a folder that transformers loads."""

from typing import Any

from cola_lightning.cli.parser import parse_function

GROUP = "Use"


def parse(args: list[str]) -> dict[str, Any]:
    """Parse the arguments of :func:`cola_lightning.hub.export.export`."""
    from cola_lightning.hub.export import export

    return parse_function(export, "export", args)


def run(options: dict[str, Any]) -> None:
    """Write the folder."""
    from cola_lightning.hub.export import export

    export(**options)
