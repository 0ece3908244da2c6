"""Pre-train LLaMA-style language models whose projections are low-rank bottlenecks (CoLA), on PyTorch Lightning."""

__all__ = ["load_model"]

# That of typing, which is not imported: until __main__ runs, Ctrl-C shows a traceback of whatever is imported here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from cola_lightning.checkpoints import load_model


def __getattr__(name: str) -> object:
    """Import ``load_model`` when it is first asked for, because it takes seconds and most imports do not need it."""
    if name == "load_model":
        from cola_lightning.checkpoints import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
