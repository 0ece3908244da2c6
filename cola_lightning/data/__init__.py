"""Data modules: documents are read, tokenized, made into rows and batched, with a position that a checkpoint holds."""

from cola_lightning.data.c4 import C4DataModule
from cola_lightning.data.sources import Source
from cola_lightning.data.streaming import StreamingDataModule
from cola_lightning.data.text import TextDataModule

__all__ = ["C4DataModule", "Source", "StreamingDataModule", "TextDataModule"]
