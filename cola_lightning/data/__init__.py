"""Text to tokens to rows to batches, each step a small object."""

from cola_lightning.data.text import TextDataModule

__all__ = ["TextDataModule"]
