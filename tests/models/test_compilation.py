"""Many compiled networks in one process, as ``benchmark`` and notebooks have them: none runs uncompiled."""

from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from cola_lightning.models.generation_step import CompiledStep
from cola_lightning.models.kv_cache import Cache
from cola_lightning.training.network import compile_network
from tests.conftest import tiny_llama

pytestmark = pytest.mark.slow
WIDTHS = range(16, 176, 16)  # ten, of which PyTorch compiles the first eight by itself


@pytest.fixture(autouse=True)
def _own_limit():
    """Begin with PyTorch's limit, whatever the tests before have compiled."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


def test_each_of_ten_networks_is_compiled_for_training(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    for width in WIDTHS:
        network = tiny_llama(hidden_size=width, num_hidden_layers=1)
        compile_network(network)
        before = counters["stats"]["unique_graphs"]
        network(torch.zeros(2, 6, dtype=torch.long))
        assert counters["stats"]["unique_graphs"] > before, width


def test_each_of_ten_networks_is_compiled_for_generation():
    """The step asks for a whole graph, so that PyTorch refuses where it does not compile."""
    for width in WIDTHS:
        network = tiny_llama(hidden_size=width, num_hidden_layers=1)
        step, cache = CompiledStep(network, backend="eager"), Cache(1, 8)
        with torch.no_grad():
            network(torch.zeros(1, 3, dtype=torch.long), cache=cache)
            step(torch.zeros(1, 1, dtype=torch.long), cache)
