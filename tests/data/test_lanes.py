from collections import Counter
from itertools import islice

import numpy as np
import pytest

from cola_lightning.data.lanes import Lane, Reader, RowShape
from cola_lightning.data.rows import IGNORE
from cola_lightning.errors import InputError

EOS, PAD = 1, 0


class Numbers:
    """Document ``n`` of shard ``s`` is the id 100 s + n + 10 a few times over, and EOS; what is encoded is counted."""

    title = "numbers"

    def __init__(self, sizes: list[int], longest: int = 9) -> None:
        self.sizes, self.longest = sizes, longest
        self.shards = [f"shard{number}" for number in range(len(sizes))]
        self.encoded: list[int] = []

    def read(self, shard, start=0, part=0, parts=1):
        for row in range(start, self.sizes[shard]):
            if row % parts == part:
                yield row, 100 * shard + row + 10

    def encode(self, documents):
        self.encoded += documents
        return [np.array([n] * (1 + n % self.longest) + [EOS], dtype=np.int32) for n in documents]


def everything(corpus):
    return {number for shard in range(len(corpus.shards)) for _, number in corpus.read(shard)}


def lane(corpus, index=0, lanes=1, state=None, block=5, weights=(1.0,), **shape):
    corpora = corpus if isinstance(corpus, list) else [corpus]
    readers = [
        Reader(some, index, lanes, block, f"7/{number}", state and state["readers"][number])
        for number, some in enumerate(corpora)
    ]
    return Lane(readers, list(weights), RowShape(**({"length": 8, "packed": True, "pad_id": PAD} | shape)), state)


def numbers_of(reader: Reader, count: int) -> list[int]:
    return [int(ids[0]) for ids in islice(reader, count)]


@pytest.mark.parametrize("sizes", [[23, 7, 40], [50], [5] * 12])
def test_each_document_once_a_pass_over_all_lanes_in_another_order_each_pass(sizes):
    corpus = Numbers(sizes)
    passes = []
    for index in range(4):
        share = [int(ids[0]) for ids in _one_pass(Reader(corpus, index, 4, 5, "7"), 0)]
        again = [int(ids[0]) for ids in _one_pass(Reader(corpus, index, 4, 5, "7"), 1)]
        assert sorted(share) == sorted(again)
        assert share != again
        passes += share
    assert sorted(passes) == sorted(everything(corpus))


def _one_pass(reader, turn):
    for ids in reader:
        if reader.state["pass"] > turn:
            return
        if reader.state["pass"] == turn:
            yield ids


def test_fewer_shards_than_lanes_make_equal_lanes():
    shares = [len(list(_one_pass(Reader(Numbers([40, 40, 40]), index, 8, 5, "7"), 0))) for index in range(8)]
    assert set(shares) == {15}


@pytest.mark.parametrize("block", [0, 1, 5, 1000])
@pytest.mark.parametrize("after", [0, 1, 4, 5, 24, 25, 26, 130])
def test_reader_goes_on_at_the_next_document(block, after):
    whole = Reader(Numbers([13, 12]), 0, 1, block, "7")
    numbers_of(whole, after)
    state = dict(whole.state)
    assert numbers_of(Reader(Numbers([13, 12]), 0, 1, block, "7", state), 60) == numbers_of(whole, 60)


def test_going_on_encodes_nothing_that_was_handed_out():
    corpus = Numbers([200])
    reader = Reader(corpus, 0, 1, 100, "7")
    seen = numbers_of(reader, 130)
    corpus.encoded.clear()
    rest = numbers_of(Reader(corpus, 0, 1, 100, "7", dict(reader.state)), 70)
    assert not set(seen) & set(corpus.encoded)
    assert sorted(seen + rest) == sorted(everything(corpus))


def test_a_corpus_without_documents_for_a_lane_is_an_error():
    with pytest.raises(InputError, match="numbers has no document for one of the lanes"):
        next(iter(Reader(Numbers([0, 0]), 0, 1, 5, "7")))
    with pytest.raises(InputError, match=r"--data\.lanes"):
        [next(iter(Reader(Numbers([3]), index, 4, 5, "7"))) for index in range(4)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("longest", [9, 60])
def test_lane_goes_on_at_the_next_token_after_any_batch(packed, longest):
    """With documents of up to 60 tokens in rows of 8, most of these places are in the middle of a document."""
    whole = lane(Numbers([30, 31], longest), packed=packed)
    for _ in range(40):
        state = whole.state()
        again = lane(Numbers([30, 31], longest), packed=packed, state=state)
        batch, same = whole.batch(3), again.batch(3)
        assert all((same[name] == values).all() for name, values in batch.items())
        assert again.state() == whole.state()


def test_packed_rows_are_the_documents_end_to_end_and_the_ledger_counts_them():
    corpus = Numbers([30])
    rows = lane(corpus)
    ids = np.concatenate([rows.batch(2)["input_ids"].flatten() for _ in range(20)])
    expected = np.concatenate(list(islice(Reader(corpus, 0, 1, 5, "7/0"), 100)))[: len(ids)]
    assert (ids == expected).all()
    assert rows.tokens == [len(ids)]
    assert rows.documents == [(ids == EOS).sum()]


def test_padded_rows_keep_the_end_of_a_document_that_is_cut():
    rows = lane(Numbers([30], longest=20), packed=False)
    batch = rows.batch(30)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        end = int((ids == EOS).nonzero())
        length = 2 + int(ids[0]) % 20
        assert end == min(length, 8) - 1
        assert (labels[: end + 1] == ids[: end + 1]).all()
        assert (labels[end + 1 :] == IGNORE).all()
        assert (ids[end + 1 :] == PAD).all()
    assert rows.tokens == [int((batch["labels"] != IGNORE).sum())]
    assert rows.documents == [30]


def test_documents_kept_apart_are_numbered_and_their_first_token_is_not_learnt():
    batch = lane(Numbers([30]), apart=True).batch(10)
    ids, labels, numbers = (batch[name].numpy() for name in ("input_ids", "labels", "document_ids"))
    for row in range(10):
        starts = [0, *(1 + np.flatnonzero(ids[row] == EOS))]
        assert [int(np.searchsorted(starts, place, side="right")) - 1 for place in range(8)] == numbers[row].tolist()
        assert all(labels[row, start] == IGNORE for start in starts[1:] if start < 8)
    kept = labels != IGNORE
    assert (labels[kept] == ids[kept]).all()


@pytest.mark.parametrize("packed", [True, False])
def test_sources_are_mixed_by_their_share_of_the_tokens(packed):
    weights = (0.5, 0.3, 0.2)
    rows = lane([Numbers([30], longest) for longest in (4, 9, 30)], weights=weights, packed=packed)
    for _ in range(100):
        rows.batch(4)
    total = sum(rows.tokens)
    assert [tokens / total for tokens in rows.tokens] == pytest.approx(weights, abs=0.01)


def test_blocks_shuffle_and_block_of_one_does_not():
    straight = numbers_of(Reader(Numbers([30]), 0, 1, 1, "7"), 30)
    shuffled = numbers_of(Reader(Numbers([30]), 0, 1, 10, "7"), 30)
    assert straight == sorted(straight)
    assert shuffled != straight
    assert [set(shuffled[i : i + 10]) for i in (0, 10, 20)] == [set(straight[i : i + 10]) for i in (0, 10, 20)]
    assert Counter(shuffled) == Counter(straight)
