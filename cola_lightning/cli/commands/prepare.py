"""Tokenize a data set once, so that training reads tokens from disk."""

from typing import Any

from cola_lightning.cli.parser import parse_function

GROUP = "Train"


def parse(args: list[str]) -> dict[str, Any]:
    """Parse the arguments of :func:`cola_lightning.data.prepare.prepare`."""
    from cola_lightning.data.prepare import prepare

    return parse_function(prepare, "prepare", "--config configs/prepare/c4.yaml", args, as_positional=False)


def run(options: dict[str, Any]) -> None:
    """Write the tokens."""
    from cola_lightning.data.prepare import prepare

    prepare(**options)
