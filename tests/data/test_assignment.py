"""Assignment of micro-batches to processes, against a simulation that assigns them one by one."""

import pytest

from cola_lightning.data.assignment import Shares


def draw(num_logical_shards, replicas, workers, at, micro_batches):
    """List rank, worker and logical shard of each micro-batch from position ``at`` on."""
    return [
        (turn % replicas, turn // replicas % workers, (at + turn) % num_logical_shards) for turn in range(micro_batches)
    ]


@pytest.mark.parametrize(("num_logical_shards", "replicas", "workers"), [(8, 2, 2), (12, 3, 2), (6, 1, 3), (5, 5, 1)])
@pytest.mark.parametrize("at", [0, 3, 20])
def test_processes_that_start_at_any_position_continue_the_rotation(num_logical_shards, replicas, workers, at):
    drawn = draw(num_logical_shards, replicas, workers, at, 200)
    assignment = {"at": at, "replicas": replicas, "workers": workers}
    owners = {}
    for rank, worker, logical_shard in drawn:
        assert owners.setdefault(logical_shard, (rank, worker)) == (rank, worker)
    for rank in range(replicas):
        shares = Shares(num_logical_shards, rank, assignment)
        assert shares.of_rank() == {index for index, owner in owners.items() if owner[0] == rank}
        for worker in range(workers):
            expected = [index for of_rank, of_worker, index in drawn if (of_rank, of_worker) == (rank, worker)]
            share = shares.of_worker(worker)
            assert (share * 200)[: len(expected)] == expected
        for steps in range(2 * num_logical_shards):
            of_rank = [index for owner, _, index in drawn if owner == rank][steps:]
            for process in range(workers):
                turns = shares.of_process(process, at + steps * replicas)
                assert turns == of_rank[process::workers][: len(turns)]


def test_the_example_of_the_docstring():
    shares = Shares(8, 0, {"at": 3, "replicas": 2, "workers": 2})
    assert [shares.of_worker(worker) for worker in (0, 1)] == [[3, 7], [5, 1]]
    assert [shares.of_process(process, 9) for process in (0, 1)] == [[1, 5], [3, 7]]
