from functools import partial

import pytest
import torch
from torch import nn

from cola_lightning.costs import count_parameters
from cola_lightning.costs.parameters import Part
from cola_lightning.methods import CoLA
from cola_lightning.models import FullRank, Projection
from tests.conftest import tiny_llama
from tests.costs.published import DIGITS, RANKS, SIZES, network


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["full", "cola"])
def test_parameters_of_all_ten_published_models(kind, size):
    d, f, layers, _ = SIZES[size]
    r, v = RANKS[size], 32000
    counted = count_parameters(network(kind, size))
    parts = {name: part.parameters for name, part in counted.parts.items()}
    assert parts == {
        "embedding": v * d,
        "attention projections": layers * (4 * d * d if kind == "full" else 8 * d * r),
        "MLP projections": layers * (3 * d * f if kind == "full" else 3 * r * (d + f)),
        "norms": (2 * layers + 1) * d,
        "head": v * d,
    }
    assert round(counted.total.parameters / 1e6, 1) == DIGITS[kind][size]
    assert counted.total.trained == counted.total.parameters


class Sparse(Projection):
    """A low-rank projection with a frozen table and its indices."""

    def __init__(self, in_features, out_features, rank):
        super().__init__()
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        self.A = nn.Parameter(torch.zeros(rank, in_features))
        self.frozen = nn.Parameter(torch.zeros(out_features, in_features), requires_grad=False)
        self.register_buffer("index", torch.zeros(7, dtype=torch.int32), persistent=False)

    def forward(self, x):
        return x @ (self.B @ self.A + self.frozen).T


def test_trained_and_frozen_parameters_and_buffers_are_counted_apart():
    counted = count_parameters(partial(tiny_llama, partial(Sparse, rank=8), num_hidden_layers=2))
    assert counted.parts["attention projections"] == Part(2 * 8 * 8 * 32, 2 * 4 * 32 * 32, 2 * 4 * 7 * 4)
    assert counted.total.frozen == 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert counted.layer.trained == 8 * (11 * 32 + 3 * 48) + 2 * 32


def test_counting_takes_no_memory():
    for projection in (FullRank, partial(CoLA, rank=16384)):
        build = partial(
            tiny_llama, projection, vocab_size=10**6, hidden_size=2**16, intermediate_size=2**18, num_hidden_layers=2
        )
        assert count_parameters(build).total.parameters > 10**11
