"""Train several methods on equal terms, and put them side by side."""

from cola_lightning.cli.commands.compare import main

__all__ = ["main"]
