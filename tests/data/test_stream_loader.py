import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from cola_lightning.data import stream_loader as stream
from cola_lightning.data.rank_exchange import OneRank
from cola_lightning.data.stream_loader import StreamError, StreamLoader, Verdict
from cola_lightning.errors import InputError
from tests.data.simulate import Numbers, Run, make_logical_shards

REPOSITORY = Path(__file__).parents[2]


MAKE = make_logical_shards(Numbers([90] * 3, longest=5), num_logical_shards=12, block=7, packed=False)


def run(ranks, workers, state=None, **others) -> Run:
    """Begin a run with real workers; the ranks are threads."""
    return Run(MAKE, ranks, workers, state, kind=StreamLoader, **others)


def documents(batches):
    return [row[0] for batch in batches for row in batch]


@pytest.mark.parametrize(
    ("ranks", "workers"), [(1, 2), (2, 0), pytest.param(3, 2, marks=pytest.mark.slow), (4, 0), (12, 0)]
)
def test_any_ranks_and_workers_that_divide_the_logical_shards_give_one_sequence(ranks, workers):
    assert run(ranks, workers).take(36) == run(1, 0).take(36)


@pytest.mark.slow
@pytest.mark.parametrize("first", [(1, 0), (2, 2), (4, 0)])
@pytest.mark.parametrize("second", [(1, 2), (2, 0), (3, 0), (6, 0)])
def test_another_number_of_ranks_and_workers_continues_the_same_sequence(first, second):
    begun = run(*first)
    before = begun.take(20)
    after = run(*second, state=begun.state()).take(24)
    assert before + after == run(1, 0).take(44)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (3, 2), (5, 0), (1, 5), (2, 4), (7, 1)])
@pytest.mark.parametrize("stops", [[1], [7], [4, 5, 1]])
def test_the_same_ranks_and_workers_resume_exactly_even_if_they_do_not_divide_the_logical_shards(ranks, workers, stops):
    whole = run(ranks, workers).take(15 * ranks)
    state, batches = None, []
    for count in [*stops, 15 - sum(stops)]:
        again = run(ranks, workers, state=state)
        batches += again.take(count * ranks)
        state = again.state()
    assert batches == whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    "changes",
    [
        [(5, 0), (1, 0)],
        [(1, 0), (5, 0)],
        [(2, 0), (7, 0), (5, 0), (3, 0)],
        pytest.param([(1, 5), (5, 1)], marks=pytest.mark.slow),
    ],
)
def test_ranks_and_workers_that_do_not_divide_the_logical_shards_lose_and_repeat_no_document(changes):
    """270 documents, two a batch: what is seen before any logical shard's second pass is seen once, and by then each
    logical shard's part is seen without a gap."""
    state, seen = None, []
    for ranks, workers in changes:
        again = run(ranks, workers, state=state)
        seen += documents(again.take(ranks * 5))
        state = again.state()
    assert all(logical_shard["readers"][0]["pass"] == 0 for logical_shard in state["logical_shards"].values())
    assert len(seen) == len(set(seen))
    for index in range(12):
        order = documents([MAKE([index], {}).batch(index, 21)["input_ids"].tolist()])
        count = state["logical_shards"].get(str(index), {"documents": [0]})["documents"][0]
        assert set(order[:count]) <= set(seen)
        assert not set(order[count:]) & set(seen)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_real_workers_give_the_sequence_of_one_process_across_passes(ranks, monkeypatch):
    """Of 270 documents in 300 micro-batches of two; logical shards part again after each pass, with new workers."""
    monkeypatch.setattr(stream, "LONG_PASS", 2)
    assert run(ranks, 2).take(300) == run(1, 0).take(300)


@pytest.mark.parametrize("workers", [0, 2])
def test_state_belongs_to_the_batch_returned_not_to_those_prefetched(workers):
    begun = run(1, workers)
    for count in range(1, 10):
        begun.take(1)
        state = begun.state()
        assert state["batches"] == count
        assert sum(logical_shard["documents"][0] for logical_shard in state["logical_shards"].values()) == 2 * count


def test_more_ranks_and_workers_than_logical_shards_are_refused():
    with pytest.raises(InputError, match="4 ranks x 4 workers are more than the 12 logical shards"):
        run(4, 4)


class Breaks(Numbers):
    def read(self, *others):
        yield from islice(super().read(*others), 3)
        raise InputError("shard7 line 6 is not JSON")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_is_raised_between_two_optimizer_steps_in_one_line(workers):
    make = make_logical_shards(Breaks([90]), num_logical_shards=4, block=3, packed=False)
    loader = StreamLoader(make, 4, 1, 100, workers=workers, batches_per_step=8)
    seen = []
    with pytest.raises(StreamError) as failure:
        seen.extend(iter(loader))
    assert str(failure.value) == "shard7 line 6 is not JSON"
    assert len(seen) == loader.position == 8


def test_a_rank_stops_when_another_fails():
    class Other(OneRank):
        answers = iter([Verdict.READ, Verdict.FAILED])

        def smallest(self, number):
            return min(number, next(self.answers))

    loader = StreamLoader(MAKE, 12, 2, 100, replicas=2, batches_per_step=3, ranks=Other())
    seen = []
    with pytest.raises(StreamError, match="another rank"):
        seen.extend(iter(loader))
    assert len(seen) == 3


HANGS = """
import os, time
from tests.data.test_stream_loader import *

class Hangs(Numbers):
    def read(self, *others):
        print(os.getpid(), flush=True)
        time.sleep(600)
        yield 0, 0

next(iter(StreamLoader(make_logical_shards(Hangs([90]), num_logical_shards=4), 4, 1, 100, workers=2)))
"""


@pytest.mark.slow
def test_workers_die_with_the_main_process_even_while_they_wait_for_a_server():
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    workers = [int(process.stdout.readline()) for _ in range(2)]
    assert all(alive(worker) for worker in workers)
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while any(alive(worker) for worker in workers) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(alive(worker) for worker in workers)


def alive(process: int) -> bool:
    """Whether a process runs. A zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_overfitting_begins_again_where_the_first_iteration_did(workers):
    """``overfit_batches: 2`` iterates again after every two batches; without it an epoch is a part of the run."""

    def batches(overfit):
        loader = StreamLoader(MAKE, 12, 2, batches=2, workers=workers, overfit=overfit)
        return [[batch["input_ids"].tolist() for batch in islice(loader, 2)] for _ in range(3)]

    again, on = batches(overfit=True), batches(overfit=False)
    assert again == [on[0]] * 3
    assert on[0] != on[1] != on[2]
