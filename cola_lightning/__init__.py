"""Pre-train LLaMA-style language models whose projections are low-rank bottlenecks (CoLA), on PyTorch Lightning."""

from cola_lightning.checkpoints import load_model

__all__ = ["load_model"]
