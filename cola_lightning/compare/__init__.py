"""Train several methods on equal terms, and put them side by side."""

from cola_lightning.compare.main import main

__all__ = ["main"]
