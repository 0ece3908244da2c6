"""Pre-train LLaMA-style language models whose projections are low-rank bottlenecks (CoLA), on PyTorch Lightning."""

from typing import Any

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Import ``load_model`` when it is first asked for, because it takes seconds and most imports do not need it."""
    if name == "load_model":
        from cola_lightning.checkpoints import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
