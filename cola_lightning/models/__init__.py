"""The network: LLaMA's decoder, its projections, its loss, and generation. Nothing here imports Lightning."""

from cola_lightning.models.config import LlamaConfig
from cola_lightning.models.generation import generate
from cola_lightning.models.llama import Llama
from cola_lightning.models.projection import CrossLayer, FullRank, MakeProjection, Projection

__all__ = ["CrossLayer", "FullRank", "Llama", "LlamaConfig", "MakeProjection", "Projection", "generate"]
