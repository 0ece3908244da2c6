import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from cola_lightning.data.lanes import Lane, Reader, RowShape
from cola_lightning.data.stream import StreamError, StreamLoader
from cola_lightning.errors import InputError
from tests.data.test_lanes import Numbers

REPOSITORY = Path(__file__).parents[2]


def make_lane(index, state):
    corpus = Numbers([90] * 3, longest=5)
    return Lane([Reader(corpus, index, 12, 7, "7", state and state["readers"][0])], [1.0], RowShape(8, False, 0), state)


def loaders(ranks, workers, state=None, **others):
    return [
        StreamLoader(make_lane, 12, 2, 100, state=state, replicas=ranks, rank=rank, workers=workers, **others)
        for rank in range(ranks)
    ]


def gathered(loaders):
    """As C4DataModule.state_dict, and through JSON, for only plain data may be in it."""
    states = [loader.state_dict() for loader in loaders]
    assert len({state["batches"] for state in states}) == 1
    merged = {lane: value for state in states for lane, value in state["lanes"].items()}
    assert len(merged) == sum(len(state["lanes"]) for state in states)  # no lane has two owners
    return json.loads(json.dumps(states[0] | {"lanes": merged}))


def take(loaders, micro_batches):
    """That many micro-batches of the run, in its order."""
    iterators = [iter(loader) for loader in loaders]
    return [
        next(iterator)["input_ids"].tolist() for _ in range(micro_batches // len(loaders)) for iterator in iterators
    ]


def documents(batches):
    return [row[0] for batch in batches for row in batch]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (3, 2), (4, 0), (12, 0)])
def test_batches_are_one_sequence_for_any_ranks_and_workers_that_divide_the_lanes(ranks, workers):
    assert take(loaders(ranks, workers), 36) == take(loaders(1, 0), 36)


@pytest.mark.parametrize("first", [(1, 0), (2, 2), (4, 0)])
@pytest.mark.parametrize("second", [(1, 2), (2, 0), (3, 0), (6, 0)])
def test_another_number_of_ranks_and_workers_goes_on_with_the_same_sequence(first, second):
    begun = loaders(*first)
    before = take(begun, 20)
    after = take(loaders(*second, state=gathered(begun)), 24)
    assert before + after == take(loaders(1, 0), 44)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (3, 2), (5, 0), (1, 5), (2, 4), (7, 1)])
@pytest.mark.parametrize("stops", [[1], [7], [4, 5, 1]])
def test_same_number_of_ranks_and_workers_goes_on_exactly_whether_or_not_they_divide_the_lanes(ranks, workers, stops):
    whole = take(loaders(ranks, workers), 15 * ranks)
    state, batches = None, []
    for count in [*stops, 15 - sum(stops)]:
        group = loaders(ranks, workers, state=state)
        batches += take(group, count * ranks)
        state = gathered(group)
    assert batches == whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    "changes", [[(5, 0), (1, 0)], [(1, 0), (5, 0)], [(2, 0), (7, 0), (5, 0), (3, 0)], [(1, 5), (5, 1)]]
)
def test_numbers_that_do_not_divide_the_lanes_lose_and_repeat_no_document(changes):
    """270 documents, two a batch: what is seen before any lane's second pass is seen once, and by then each lane's
    part is seen without a gap."""
    state, seen = None, []
    for ranks, workers in changes:
        group = loaders(ranks, workers, state=state)
        seen += documents(take(group, ranks * 5))
        state = gathered(group)
    assert all(lane["readers"][0]["pass"] == 0 for lane in state["lanes"].values())
    assert len(seen) == len(set(seen))
    straight = [documents(make_lane(index, None).batch(22)["input_ids"].unsqueeze(0).tolist()) for index in range(12)]
    for index, order in enumerate(straight):
        count = state["lanes"].get(str(index), {"documents": [0]})["documents"][0]
        assert set(order[:count]) <= set(seen)
        assert not set(order[count:]) & set(seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_state_belongs_to_the_batch_handed_over_not_to_those_read_ahead(workers):
    loader = loaders(1, workers)[0]
    iterator = iter(loader)
    batches = []
    for count in range(1, 10):
        batches.append(next(iterator)["input_ids"].tolist())
        state = gathered([loader])
        assert state["batches"] == count
        assert sum(lane["documents"][0] for lane in state["lanes"].values()) == 2 * count


def test_more_ranks_and_workers_than_lanes_are_refused():
    with pytest.raises(InputError, match="4 ranks x 4 workers are more than the 12 lanes"):
        loaders(4, 4)


class Breaks(Numbers):
    def read(self, shard, start=0, part=0, parts=1):
        yield from islice(super().read(shard, start, part, parts), 5)
        raise InputError("shard7 line 6 is not JSON")


@pytest.mark.parametrize("workers", [0, 2])
def test_failure_comes_between_two_optimizer_steps_with_its_one_line(workers):
    def breaking(index, state):
        return Lane([Reader(Breaks([90]), index, 4, 3, "7")], [1.0], RowShape(8, False, 0), state)

    loader = StreamLoader(breaking, 4, 1, 100, workers=workers, window=8)
    seen = []
    with pytest.raises(StreamError) as failure:
        seen.extend(iter(loader))
    assert str(failure.value) == "shard7 line 6 is not JSON"
    assert len(seen) == loader.position == 8


def test_a_rank_stops_when_another_cannot_go_on():
    answers = iter([True, False])
    loader = StreamLoader(make_lane, 12, 2, 100, replicas=2, window=3, all_well=lambda well: next(answers))
    seen = []
    with pytest.raises(StreamError, match="another rank"):
        seen.extend(iter(loader))
    assert len(seen) == 3


HANGS = """
import os, time
from tests.data.test_stream import *

class Hangs(Numbers):
    def read(self, shard, start=0, part=0, parts=1):
        print(os.getpid(), flush=True)
        time.sleep(600)
        yield 0, 0

def hanging(index, state):
    return Lane([Reader(Hangs([90]), index, 4, 3, "7")], [1.0], RowShape(8, False, 0), state)

next(iter(StreamLoader(hanging, 4, 1, 100, workers=2)))
"""


def test_workers_die_with_the_main_process_even_while_they_wait_for_a_server():
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    workers = [int(process.stdout.readline()) for _ in range(2)]
    assert all(alive(worker) for worker in workers)
    process.kill()
    process.wait()
    until = time.monotonic() + 3
    while any(alive(worker) for worker in workers) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(alive(worker) for worker in workers)


def alive(process: int) -> bool:
    """Whether it runs; one that is dead and not yet waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
