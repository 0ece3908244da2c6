from collections import Counter

import numpy as np
import pytest

from cola_lightning.data import encoding
from cola_lightning.data.logical_shards import LogicalShard
from cola_lightning.data.packing import IGNORE
from cola_lightning.data.passes import Reader
from tests.data.simulate import EOS, PAD, Numbers, make_logical_shards


def logical_shard(corpora, index=0, num_logical_shards=1, state=None, **shape) -> LogicalShard:
    corpora = corpora if isinstance(corpora, list) else [corpora]
    make = make_logical_shards(*corpora, num_logical_shards=num_logical_shards, **shape)
    return make([index], {str(index): state} if state else {}).logical_shards[index]


def reader(corpus, index=0, num_logical_shards=1, block=5, state=None) -> Reader:
    return Reader(corpus, index, num_logical_shards, block, "7/0", state)


def numbers_of(reader: Reader, count: int) -> list[int]:
    """Return the first ids of the next documents, pass after pass."""
    numbers = []
    while len(numbers) < count:
        document = reader.next()
        if document is None:
            reader.begin_pass(reader.state["pass"] + 1)
        else:
            numbers.append(int(document.ids[0]))
    return numbers


def one_pass(reader: Reader) -> list[int]:
    return [int(document.ids[0]) for document in iter(reader.next, None)]


@pytest.mark.parametrize("sizes", [[23, 7, 40], [50], [5] * 12, [0, 30, 0, 1]])
def test_each_pass_reads_every_document_once_in_a_new_order(sizes):
    corpus = Numbers(sizes)
    orders = []
    for turn in range(2):
        readers = [reader(corpus, index, 4) for index in range(4)]
        for some in readers:
            some.begin_pass(turn)
        orders.append([number for some in readers for number in one_pass(some)])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(corpus.everything())
    assert orders[0] != orders[1]


def test_fewer_files_than_logical_shards_make_equal_logical_shards():
    assert {len(one_pass(reader(Numbers([40, 40, 40]), index, 8))) for index in range(8)} == {15}


@pytest.mark.parametrize("block", [0, 1, 5, 1000])
@pytest.mark.parametrize("after", [0, 1, 4, 5, 24, 25, 26, 130])
def test_reader_resumes_at_the_next_document(block, after):
    whole = reader(Numbers([13, 12]), block=block)
    numbers_of(whole, after)
    state = dict(whole.state)
    assert numbers_of(reader(Numbers([13, 12]), block=block, state=state), 60) == numbers_of(whole, 60)


def test_resuming_encodes_no_document_again():
    corpus = Numbers([200])
    first = reader(corpus, block=100)
    seen = numbers_of(first, 130)
    corpus.encoded.clear()
    rest = numbers_of(reader(corpus, block=100, state=dict(first.state)), 70)
    assert not set(seen) & set(corpus.encoded)
    assert set(seen + rest) == corpus.everything()
    assert len(seen + rest) == 200


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("longest", [9, 60])
def test_a_logical_shard_resumes_at_the_next_token_after_any_batch(packed, longest):
    """Documents have up to 60 tokens and rows have 8, so most of these positions are inside a document."""
    whole = logical_shard(Numbers([30, 31], longest), packed=packed)
    for _ in range(40):
        state = whole.state()
        again = logical_shard(Numbers([30, 31], longest), packed=packed, state=state)
        batch, same = whole.batch(3), again.batch(3)
        assert all((same[name] == values).all() for name, values in batch.items())
        assert again.state() == whole.state()


def test_packed_rows_are_the_documents_end_to_end_and_are_counted_by_source():
    corpus = Numbers([30])
    rows = logical_shard(corpus)
    ids = np.concatenate([rows.batch(2)["input_ids"].flatten() for _ in range(20)])
    order = numbers_of(reader(corpus), 100)
    expected = np.concatenate(corpus.encode([[number] for number in order]))[: len(ids)]
    assert (ids == expected).all()
    assert rows.tokens == [len(ids)]
    assert rows.documents == [(ids == EOS).sum()]


def test_padded_rows_keep_the_end_of_a_document_that_is_cut():
    rows = logical_shard(Numbers([30], longest=20), packed=False)
    batch = rows.batch(30)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        end = int((ids == EOS).nonzero())
        length = 2 + int(ids[0]) // 2 % 20
        assert end == min(length, 8) - 1
        assert (labels[: end + 1] == ids[: end + 1]).all()
        assert (labels[end + 1 :] == IGNORE).all()
        assert (ids[end + 1 :] == PAD).all()
    assert rows.tokens == [int((batch["labels"] != IGNORE).sum())]
    assert rows.documents == [30]


def test_masked_documents_are_numbered_and_their_first_token_is_not_learnt():
    batch = logical_shard(Numbers([30]), mask_documents=True).batch(10)
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
    rows = logical_shard([Numbers([30], longest) for longest in (4, 9, 30)], weights=weights, packed=packed)
    for _ in range(100):
        rows.batch(4)
    total = sum(rows.tokens)
    assert [tokens / total for tokens in rows.tokens] == pytest.approx(weights, abs=0.01)


def test_documents_are_shuffled_in_blocks_and_a_block_of_one_keeps_the_order():
    straight = numbers_of(reader(Numbers([30]), block=1), 30)
    shuffled = numbers_of(reader(Numbers([30]), block=10), 30)
    assert straight == sorted(straight)
    assert shuffled != straight
    assert [set(shuffled[i : i + 10]) for i in (0, 10, 20)] == [set(straight[i : i + 10]) for i in (0, 10, 20)]
    assert Counter(shuffled) == Counter(straight)


def test_long_documents_cost_no_more_for_each_batch_and_the_state_stays_small():
    """A document of 600,000 ids is cut into 75,000 rows. Its remaining ids were once part of each state, as a list."""
    corpus = Numbers([3], longest=600_000, first=2 * 599_000)
    rows = logical_shard(corpus)
    for _ in range(3):
        rows.batch(1000)
    state = rows.state()
    assert len(str(state)) < 500
    again = logical_shard(corpus, state=state)
    assert (again.batch(5)["input_ids"] == rows.batch(5)["input_ids"]).all()
    assert again.state() == rows.state()


def test_documents_are_encoded_in_groups_of_bounded_size(monkeypatch):
    monkeypatch.setattr(encoding, "ENCODE_BATCH_CHARACTERS", 10)
    groups = []

    class Texts(Numbers):
        def encode(self, documents):
            groups.append(len(documents))
            return super().encode([[10] for _ in documents])

        def read(self, *others):
            return ((row, "x" * (30 if row == 4 else 3)) for row, _ in super().read(*others))

    assert len(one_pass(reader(Texts([12]), block=1000))) == 12
    assert max(groups) == 3
    assert sum(groups) == 12
