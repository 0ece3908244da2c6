"""Sizes of the published models, from the configurations of GaLore and CoLA."""

from functools import partial

from cola_lightning.methods import CoLA
from cola_lightning.models import FullRank, LlamaConfig
from cola_lightning.models.llama import build_llama

SIZES = {
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "7b": (4096, 11008, 32, 32),
}
"""D, F, layers, heads."""
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}
DIGITS = {
    "full": {"60m": 58.1, "130m": 134.1, "350m": 368.0, "1b": 1339.1, "7b": 6738.4},
    "cola": {"60m": 42.8, "130m": 94.0, "350m": 185.2, "1b": 609.3, "7b": 2820.9},
}
"""Parameters in millions."""


def network(kind: str, size: str) -> partial:
    d, f, layers, heads = SIZES[size]
    projection = FullRank if kind == "full" else partial(CoLA, rank=RANKS[size])
    return partial(build_llama, config=LlamaConfig(32000, d, f, layers, heads), projection=projection)
