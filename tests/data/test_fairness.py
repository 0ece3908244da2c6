"""No document is repeated before all were seen, for random numbers of shards, ranks, workers and sources.

The counts come from the batches alone, because the first id of each document is unique.
"""

from collections import Counter
from random import Random

import pytest

from cola_lightning.data import stream_loader as stream
from cola_lightning.data.passes import divide
from cola_lightning.errors import InputError
from tests.data.simulate import Numbers, Run, make_logical_shards

NUM_LOGICAL_SHARDS = 12


@pytest.fixture(autouse=True)
def short_passes(monkeypatch):
    """Let logical shards divide the documents again after a short pass, so that both ways to read are tested."""
    monkeypatch.setattr(stream, "LONG_PASS", 2)


class Layout:
    """Random shards of random sources, random numbers of ranks and workers, and the steps of the kills."""

    def __init__(self, number: int) -> None:
        draw = Random(number)
        self.corpora = []
        for source in range(draw.randint(1, 3)):
            sizes = [draw.choice([0, 1, draw.randint(2, 40)]) for _ in range(draw.randint(1, 40))]
            sizes[draw.randrange(len(sizes))] += 1
            first = 10 + 200_000 * source
            self.corpora.append(Numbers(sizes, longest=draw.choice([3, 9, 40]), first=first, title=f"source {source}"))
        parts = [draw.uniform(0.2, 1) for _ in self.corpora]
        self.weights = [part / sum(parts) for part in parts]
        self.packed = draw.random() < 0.5
        self.ranks, self.workers = draw.choice([1, 2, 3, 4]), draw.choice([0, 1, 2, 3])
        self.block, self.batches_per_step = draw.choice([1, 4, 30]), draw.choice([1, 2, 3])
        self.kills = [draw.randint(1, 20) for _ in range(3)]

    def make(self):
        return make_logical_shards(
            *self.corpora,
            num_logical_shards=NUM_LOGICAL_SHARDS,
            block=self.block,
            weights=self.weights,
            packed=self.packed,
            length=16,
        )

    def run(self, **others) -> Run:
        return Run(
            self.make(),
            **{"ranks": self.ranks, "workers": self.workers, "batches_per_step": self.batches_per_step} | others,
        )

    def micro_batches(self, passes: float) -> int:
        """Count the micro-batches that hold ``passes`` times the documents of all sources."""
        lengths = [2 + begin // 2 % corpus.longest for corpus in self.corpora for begin in corpus.everything()]
        rows = sum(lengths) / 16 if self.packed else len(lengths)
        return min(1500, max(60, int(passes * rows / 2)))


def counts(layout: Layout, batches) -> list[Counter]:
    """Count how often each document has begun, by source."""
    seen = Counter(token for batch in batches for row in batch for token in row)
    return [Counter({begin: seen[begin] for begin in corpus.everything()}) for corpus in layout.corpora]


def check_fair(layout: Layout, batches) -> None:
    for count in counts(layout, batches):
        assert max(count.values()) - min(count.values()) <= 1


def group(layout: Layout, ranks: int, micro_batches: int) -> int:
    """Round up to a multiple of the micro-batches of all ranks in an optimizer step."""
    step = ranks * layout.batches_per_step
    return -(-micro_batches // step) * step


@pytest.mark.slow
@pytest.mark.parametrize("number", range(24))
def test_no_document_is_repeated_before_all_were_seen_at_any_point_or_after_a_kill(number):
    layout = Layout(number)
    total = group(layout, layout.ranks, layout.micro_batches(2.3))
    whole = layout.run().take(total)
    for end in {total // 7, total // 3, total // 2, total}:
        check_fair(layout, whole[: group(layout, layout.ranks, end)])
    batches, state = [], None
    for kill in [*layout.kills, 10**6]:
        again = layout.run(state=state)
        batches += again.take(min(kill * layout.ranks * layout.batches_per_step, total - len(batches)))
        state = again.state()
    assert batches == whole
    if len(layout.corpora) == 1 and total < 1500:
        assert min(counts(layout, whole)[0].values()) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("number", range(60, 70))
def test_sequence_is_the_same_for_ranks_and_workers_that_divide_the_logical_shards_and_fair_for_all(number):
    layout = Layout(number)
    total = 12 * layout.batches_per_step * 6
    alone = layout.run(ranks=1, workers=0).take(total)
    for ranks, workers in [(2, 3), (4, 0), (3, 2)]:
        assert layout.run(ranks=ranks, workers=workers).take(total) == alone
    batches, state = [], None
    for ranks, workers in [(3, 1), (1, 2), (5, 2), (4, 3), (1, 0), (2, 0)]:
        again = layout.run(ranks=ranks, workers=workers, state=state)
        batches += again.take(group(layout, ranks, 20))
        check_fair(layout, batches)
        state = again.state()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(90, 98))
def test_every_source_has_its_share_of_the_tokens(number):
    """One rank is enough, because the test above shows that several ranks give the same sequence."""
    layout = Layout(number)
    run = layout.run(ranks=1, workers=0, batch_size=8)
    run.take(group(layout, 1, 800))
    logical_shards = run.state()["logical_shards"].values()
    tokens = [
        sum(logical_shard["tokens"][source] for logical_shard in logical_shards)
        for source in range(len(layout.corpora))
    ]
    assert [count / sum(tokens) for count in tokens] == pytest.approx(layout.weights, rel=0.01)


@pytest.mark.parametrize("packed", [True, False])
def test_a_source_of_small_weight_has_its_share_from_the_first_batches(packed):
    """When each logical shard began with a document of every source, a source of weight 1e-6 gave an eighth of the
    first 16 batches. Of 8,000 documents of equal length, 80 are due at a weight of 1/100, and none at 1e-6.
    """
    for weight, due in ((1e-2, 80), (1e-6, 0)):
        corpora = [Numbers([500] * 20, longest=1), Numbers([500] * 20, longest=1, first=500_000)]
        make = make_logical_shards(
            *corpora, num_logical_shards=16, weights=(1 - weight, weight), packed=packed, length=2
        )
        for share in (0.25, 1.0):
            batches = Run(make, batch_size=10).take(int(800 * share))
            begun = sum(row[0] >= 500_000 for batch in batches for row in batch)
            assert begun == pytest.approx(due * share, abs=2)


def test_documents_of_very_different_length_are_drawn_fairly():
    """Some shards have documents of 2 tokens, others of up to 400; rows are packed."""
    short, long = Numbers([40] * 10, longest=1), Numbers([40] * 3, longest=400, first=100_000)

    class Both(Numbers):
        def read(self, shard, *others):
            return (short if shard < 10 else long).read(shard % 10, *others)

        def encode(self, documents):
            return [(short if first < 100_000 else long).encode([[first]])[0] for [first] in documents]

        def everything(self):
            return short.everything() | long.everything()

    corpus = Both([0] * 13)
    run = Run(make_logical_shards(corpus, num_logical_shards=4, length=16), ranks=2, workers=2)
    seen: Counter = Counter()
    for _ in range(300):
        seen.update(token for batch in run.take(4) for row in batch for token in row)
        begun = [seen[begin] for begin in corpus.everything()]
        assert max(begun) - min(begun) <= 1
    assert min(begun) >= 1


def test_stretches_are_equal_and_open_few_shards():
    for shards in range(1, 41):
        stretches = [divide(range(shards), logical_shard, 16) for logical_shard in range(16)]
        assert {sum(share.last - share.first for _, share in stretch) for stretch in stretches} == {shards}
        assert sum(map(len, stretches)) <= shards + 15
        parts = Counter(
            (shard, part)
            for stretch in stretches
            for shard, share in stretch
            for part in range(share.first, share.last)
        )
        assert len(parts) == shards * 16
        assert set(parts.values()) == {1}


@pytest.mark.parametrize("sizes", [[0, 0], [0]])
def test_a_source_without_any_document_is_an_error(sizes):
    with pytest.raises(InputError, match="empty one has no document; every shard or every text is empty"):
        Run(make_logical_shards(Numbers(sizes, title="empty one"), num_logical_shards=4)).take(1)


def test_fewer_documents_than_logical_shards_are_enough():
    batches = Run(make_logical_shards(Numbers([3]), num_logical_shards=8, packed=False), ranks=2, workers=2).take(24)
    assert Counter(row[0] for batch in batches for row in batch) == dict.fromkeys(Numbers([3]).everything(), 16)
