from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA, LowRank
from cola_lightning.models import FullRank
from tests.conftest import tiny_llama


def hugging_face(key_value_heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        attn_implementation="eager",
        pad_token_id=None,
    )
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
def test_full_rank_equals_hugging_face(key_value_heads):
    theirs = hugging_face(key_value_heads)
    ours = tiny_llama(FullRank, num_key_value_heads=key_value_heads, pad_token_id=None)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(300, (2, 20))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("projection", [partial(CoLA, rank=4), partial(LowRank, rank=4), FullRank])
def test_grouped_query_attention_sizes_every_projection(projection):
    network = tiny_llama(projection, num_key_value_heads=2)
    outputs = {}
    for name, module in network.model.layers[0].self_attn.named_children():
        module.register_forward_hook(lambda _, args, out, name=name: outputs.update({name: out.shape[-1]}))
    network(torch.randint(300, (1, 5)))
    assert outputs == {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}


def test_is_causal():
    network = tiny_llama().eval()
    ids = torch.randint(300, (1, 12))
    changed = ids.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 300
    difference = (network(ids) - network(changed)).abs().amax(-1)[0]
    assert difference[:8].max() == 0
    assert difference[8:].min() > 0


def test_gate_silu_is_an_option():
    with_silu, without = tiny_llama(gate_silu=True), tiny_llama(gate_silu=False)
    ids = torch.randint(300, (1, 5))
    assert with_silu.state_dict().keys() == without.state_dict().keys()
    assert not torch.allclose(with_silu(ids), without(ids))


def test_padding_row_is_zero_and_stays():
    network = tiny_llama(pad_token_id=0)
    assert network.model.embed_tokens.weight[0].abs().max() == 0
    network(torch.zeros(1, 5, dtype=torch.long)).sum().backward()
    assert network.model.embed_tokens.weight.grad[0].abs().max() == 0


def test_materialised_by_module_starts_like_built_whole():
    """FSDP and ZeRO-3 build on the meta device and call reset_parameters of the modules that own parameters."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "projection": partial(CoLA, rank=32)}
    with torch.device("meta"):
        network = tiny_llama(**sizes)
    whole = dict(tiny_llama(**sizes).named_parameters())
    network.to_empty(device="cpu")
    for module in network.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.std(), whole[name].std(), rtol=0.1, atol=1e-3)
        assert parameter.isfinite().all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_attention_heads": 5}, r"num_attention_heads 5 does not divide hidden_size 32.*instance 4"),
        ({"num_attention_heads": 32}, r"heads of 1.*even head dimension"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads 3 does not divide num_attention_heads 4.*instance 2"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads is 0; it must be at least 1"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers is 0"),
        ({"vocab_size": -1}, r"vocab_size is -1"),
        ({"pad_token_id": 300}, r"pad_token_id 300 is not one of the 300 ids"),
        ({"projection": partial(CoLA, rank=0)}, r"rank 0 does not fit a projection of 32 to 32.*from 1 to 32"),
        ({"projection": partial(CoLA, rank=33)}, r"rank 33 does not fit.*from 1 to 32"),
    ],
)
def test_refuses_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(InputError, match=message):
        tiny_llama(**sizes)


def test_refuses_a_sequence_beyond_the_table():
    with pytest.raises(InputError, match="17 tokens is beyond max_position_embeddings 16"):
        tiny_llama(max_position_embeddings=16)(torch.zeros(1, 17, dtype=torch.long))


def test_rotary_angles_keep_their_precision_under_bf16():
    ids = torch.randint(300, (1, 1000))
    network = tiny_llama(num_hidden_layers=1)
    expected = network(ids)
    actual = network.bfloat16()(ids).float()
    assert (actual - expected).norm() / expected.norm() < 0.02
