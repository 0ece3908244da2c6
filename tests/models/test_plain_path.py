"""The config of sizes, and what stands beside the plain layer: names, classes and compiled graphs."""

import inspect
from dataclasses import MISSING, fields
from functools import partial

import pytest
import torch

from cola_lightning.methods import CoLA, CoLAM, CRNet, LaX
from cola_lightning.models import FullRank, LlamaConfig
from cola_lightning.models.activation_checkpointing import RecomputedBlock
from cola_lightning.models.attention import Attention
from cola_lightning.models.block import Block
from cola_lightning.models.mlp import MLP
from cola_lightning.training.module import LanguageModel
from tests.conftest import tiny_llama

FUSED = {"fused_projections": True}


def test_the_module_takes_every_field_of_the_config_with_the_same_default():
    """Its arguments are the command line's flags and a checkpoint's hyper-parameters, so they stay flat."""
    arguments = inspect.signature(LanguageModel).parameters
    for field in fields(LlamaConfig):
        assert field.name in arguments
        if field.default is not MISSING:
            assert arguments[field.name].default == field.default, field.name
    changed = {
        "vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 77, "rope_theta": 123.0, "rms_norm_eps": 1e-3,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "gate_silu": False, "pad_token_id": None,
        "fused_projections": True, "loss_chunk_size": 5,
    }  # fmt: skip
    assert changed.keys() == {field.name for field in fields(LlamaConfig)}
    model = LanguageModel(**changed, projection=partial(CoLA, rank=4))
    network = model.build()
    assert model.config == network.config == LlamaConfig(**changed)
    assert (network.config.key_value_heads, network.config.head_dim) == (3, 4)
    assert {name: value for name, value in model.hparams.items() if name in changed} == changed


def test_a_plain_network_is_made_of_plain_layers():
    network = tiny_llama(FullRank)
    for layer in network.model.layers:
        assert (type(layer), type(layer.self_attn), type(layer.mlp)) == (Block, Attention, MLP)


@pytest.mark.parametrize("keep", ["residual_and_latents", "attention_and_mlp_latents", "latents", "block_input"])
def test_recompute_keeps_names_and_may_be_set_twice(keep):
    network = tiny_llama()
    names = list(network.state_dict())
    CoLAM(keep).apply(network)
    CoLAM(keep).apply(network)
    assert list(network.state_dict()) == names
    assert all(type(layer) is RecomputedBlock for layer in network.model.layers)


PATHS = [
    (partial(CoLA, rank=8), {}, "residual_and_latents"),
    (FullRank, {}, None),
    (FullRank, FUSED, None),
    (partial(CoLA, rank=8), FUSED, None),
    (partial(CoLA, rank=8), FUSED, "block_input"),
    (partial(LaX, rank=8), {}, None),
    (partial(LaX, rank=8), {}, "residual_and_latents"),
    (partial(CRNet, rank=8), {}, None),
    (partial(CRNet, rank=8), {}, "block_input"),
]


@pytest.mark.parametrize(
    ("projection", "sizes", "keep"), [PATHS[0], *(pytest.param(*path, marks=pytest.mark.slow) for path in PATHS[1:])]
)
def test_a_layer_is_one_graph(projection, sizes, keep):
    """Counted by torch: no way beside the plain path breaks the graph that ``torch.compile`` makes of a layer."""
    torch._dynamo.reset()
    network = tiny_llama(projection, num_hidden_layers=2, **sizes)
    if keep:
        CoLAM(keep).apply(network)
    x = torch.randn(2, 6, 32, requires_grad=True)
    rotary = network.model.rotary(6, like=x)
    out = network.model.layers[0](x, rotary)
    x, *received = out if isinstance(out, tuple) else (out,)
    found = torch._dynamo.explain(network.model.layers[1])(x, rotary, *received)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
