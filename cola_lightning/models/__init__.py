"""Networks only: nothing here knows of Lightning."""

from cola_lightning.models.config import LlamaConfig
from cola_lightning.models.generation import generate
from cola_lightning.models.layers import CrossLayer, FullRank, MakeProjection, Projection
from cola_lightning.models.llama import Llama

__all__ = ["CrossLayer", "FullRank", "Llama", "LlamaConfig", "MakeProjection", "Projection", "generate"]
