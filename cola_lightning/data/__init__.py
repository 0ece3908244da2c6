"""Text to tokens to rows to batches, each step a small object."""

from cola_lightning.data.c4 import C4DataModule
from cola_lightning.data.sources import Source
from cola_lightning.data.text import TextDataModule

__all__ = ["C4DataModule", "Source", "TextDataModule"]
