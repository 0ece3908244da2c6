"""Networks of another's, for ``benchmark --peer``."""

from functools import partial
from types import SimpleNamespace

from torch import nn

from cola_lightning.methods import CoLA
from cola_lightning.models import Llama, LlamaConfig


def same() -> nn.Module:
    """Return the network of ``conftest.tiny_run``."""
    return Llama(LlamaConfig(300, 32, 48, 2, 4), partial(CoLA, rank=8))


class _Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = same()

    def forward(self, ids):
        return SimpleNamespace(logits=self.inner(ids))


def wrapped() -> nn.Module:
    """Return the same, with an output like those of transformers."""
    return _Wrapped()


def nothing() -> str:
    return "no network"
