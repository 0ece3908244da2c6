import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cola_lightning.methods import LowRank
from cola_lightning.models import Llama, generate
from cola_lightning.models.generation import pad_left
from cola_lightning.models.kv_cache import Cache
from cola_lightning.models.sampling import sample
from tests.conftest import tiny_llama


def without_cache(network: Llama, ids: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy continuation that computes everything anew for each token."""
    for _ in range(new):
        logits = network(ids[:, -network.config.max_position_embeddings :])
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_cached_and_uncached_generation_are_equal(key_value_heads):
    network = tiny_llama(num_key_value_heads=key_value_heads).eval()
    ids = torch.randint(300, (2, 4))
    assert torch.equal(generate(network, ids, 12, temperature=0), without_cache(network, ids, 12))


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 1, 3], [2, 5, 2]])
@torch.no_grad()
def test_logits_with_a_cache_are_those_without(pieces):
    network = tiny_llama(num_key_value_heads=2).eval()
    ids = torch.randint(300, (3, 9))
    cache = Cache(3, 9)
    logits = torch.cat([network(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
    assert cache.length == 9
    torch.testing.assert_close(logits, network(ids), atol=1e-5, rtol=1e-5)


def test_each_token_is_computed_once_and_only_the_last_has_logits():
    network = tiny_llama().eval()
    read, scored = [], []
    network.model.norm.register_forward_hook(lambda module, args, out: read.append(out.shape[1]))
    network.lm_head.register_forward_hook(lambda module, args, out: scored.append(out.shape[:-1].numel()))
    generate(network, torch.randint(300, (2, 7)), 5)
    assert read == [7, 1, 1, 1, 1]
    assert scored == [2] * 5  # the last token of each row


@pytest.mark.parametrize("rows", [1, 2])
def test_the_head_of_a_prompts_last_tokens_is_one_product_of_two_matrices(rows):
    """A batch of products copies the head's matrix on a processor in bf16, which took longer than all layers."""
    network = tiny_llama().eval().requires_grad_(False)  # as for generation: a frozen weight is treated differently
    ids = torch.randint(0, network.config.vocab_size, (rows, 9))
    with FlopCounterMode(display=False) as counter:
        network(ids, last_only=True)
    sizes = network.config
    assert torch.ops.aten.bmm not in counter.get_flop_counts()["Global"]
    assert counter.get_flop_counts()["Llama.lm_head"] == {
        torch.ops.aten.mm: 2 * rows * sizes.hidden_size * sizes.vocab_size
    }


def test_prompts_of_different_lengths_are_continued_as_each_alone():
    network = tiny_llama(max_position_embeddings=16).eval()  # the longest outgrows it
    prompts = [torch.randint(300, (length,)).tolist() for length in (3, 9, 1)]
    ids, padding = pad_left(prompts)
    assert ids.shape == (3, 9)
    together = generate(network, ids, 5, padding=padding, temperature=0)
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate(network, torch.tensor([prompt]), 5, temperature=0)
        assert row[9 - len(prompt) :].tolist() == alone[0].tolist()
    assert generate(network, ids, 12, padding=padding, temperature=0).shape == (3, 21)


def test_same_generator_same_text_and_top_1_is_greedy():
    network = tiny_llama().eval()
    ids = torch.randint(300, (1, 4))
    first, second = (generate(network, ids, 8, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    greedy = generate(network, ids, 8, temperature=0)
    assert torch.equal(generate(network, ids, 8, top_k=1), greedy)
    assert torch.equal(generate(network, ids, 8, top_p=1e-6), greedy)


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.49}, {0}),
        ({"top_k": 3, "top_p": 0.95}, {0, 1, 2}),
    ],
)
def test_draws_from_the_likeliest(options, drawn):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, 4)
    ids = sample(logits, 1.0, **options, generator=torch.Generator().manual_seed(0))
    assert set(ids.flatten().tolist()) == drawn


def test_temperature_sharpens():
    logits = torch.tensor([0.6, 0.4]).log().expand(20000, 2)
    ids = sample(logits, 0.5, generator=torch.Generator().manual_seed(0))
    assert (ids == 0).float().mean().item() == pytest.approx(0.36 / (0.36 + 0.16), abs=0.02)


def test_stops_when_every_row_has_and_fills_up():
    network = tiny_llama().eval()
    ids = torch.randint(300, (2, 4))
    greedy = generate(network, ids, 6, temperature=0)
    stop = int(greedy[0, 5])
    out = generate(network, ids, 6, temperature=0, stop_id=stop)
    assert (out[0, 5:] == stop).all()
    alone = generate(network, ids[:1], 6, temperature=0, stop_id=stop)
    assert alone.shape[1] <= 6


def test_a_context_longer_than_the_table_slides():
    network = tiny_llama(max_position_embeddings=8).eval()
    ids = torch.randint(300, (1, 6))
    assert torch.equal(generate(network, ids, 10, temperature=0), without_cache(network, ids, 10))
    long = torch.randint(300, (1, 12))
    assert torch.equal(generate(network, long, 3, temperature=0), without_cache(network, long, 3))


@pytest.mark.slow
def test_compiled_layers_are_not_compiled_again_for_every_length():
    network = tiny_llama(lambda i, o: LowRank(i, o, 4)).eval()
    for layer in network.model.layers:
        layer.compile(backend=_refuse)
    assert generate(network, torch.randint(300, (1, 4)), 3).shape == (1, 7)


def _refuse(graph, inputs):
    raise AssertionError("compiled")
