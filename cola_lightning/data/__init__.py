"""Text to tokens to rows to batches, each step a small object."""

from cola_lightning.data.sources import Source
from cola_lightning.data.streaming import C4DataModule
from cola_lightning.data.text import TextDataModule

__all__ = ["C4DataModule", "Source", "TextDataModule"]
