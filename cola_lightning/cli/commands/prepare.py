"""Tokenize a data set once, so that training reads tokens from disk."""

from typing import Any

from cola_lightning.cli.help_pages import FunctionHelp, show_if_asked
from cola_lightning.light_import import import_lightning

GROUP = "Train"
EXAMPLE = "--config configs/prepare/c4.yaml"


def help_page() -> FunctionHelp:
    """Make the help of the command."""
    return FunctionHelp("prepare", EXAMPLE, "data/prepare.py:prepare", nested={"source": "data/sources.py:Source"})


def parse(args: list[str]) -> dict[str, Any]:
    """Parse the arguments of :func:`cola_lightning.data.prepare.prepare`."""
    show_if_asked(help_page, args)
    import_lightning()
    from cola_lightning.cli.parser import parse_function
    from cola_lightning.data.prepare import prepare

    return parse_function(prepare, "prepare", EXAMPLE, args, as_positional=False)


def run(options: dict[str, Any]) -> None:
    """Write the tokens."""
    from cola_lightning.data.prepare import prepare

    prepare(**options)
