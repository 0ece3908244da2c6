import torch

from cola_lightning.models import generate
from tests.conftest import tiny_llama


def test_greedy_takes_the_likeliest_token_each_time():
    network = tiny_llama().eval()
    ids = torch.randint(300, (2, 4))
    out = generate(network, ids, 5, temperature=0)
    assert out.shape == (2, 9)
    for length in range(4, 9):
        assert torch.equal(out[:, length], network(out[:, :length])[:, -1].argmax(-1))


def test_same_generator_same_text_and_top_1_is_greedy():
    network = tiny_llama().eval()
    ids = torch.randint(300, (1, 4))
    first, second = (generate(network, ids, 8, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(generate(network, ids, 8, top_k=1), generate(network, ids, 8, temperature=0))


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
    assert generate(network, torch.randint(300, (1, 6)), 10).shape == (1, 16)
