"""Runs that are killed and resumed, against uninterrupted runs, in real processes; see resume_runs.py."""

import gzip
import json
import shutil
import signal
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from tests.data.conftest import arguments
from tests.data.resume_runs import train
from tests.processes import Run

pytestmark = pytest.mark.distributed

CELLS = list(product(["streamed", "prepared"], [0, 2], [1, 2], ["padded", "packed"]))
STEPS, ACCUMULATE, SAVED, KILLED = 10, 2, 6, 8


def run_all(runs: list[dict]) -> None:
    for run in runs:
        started = Run(train, run, ranks=run["ranks"], folder=Path(run["folder"]))
        expected = run.get("expect", -signal.SIGKILL if "kill_at" in run else 0)
        assert started.wait() == [expected] * run["ranks"], started.output()


def log(folder: Path, rank: int) -> list[str]:
    """Read the log of a rank: for each micro-batch its number, a hash of its ids and labels, and the loss."""
    return (folder / f"log.{rank}").read_text().splitlines()


@pytest.fixture(scope="module")
def runs(c4, prepared, tmp_path_factory) -> Path:
    """Train three runs for each cell: uninterrupted, killed, and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    planned = []
    for kind, workers, ranks, rows in CELLS:
        data = arguments(c4, rows=rows, num_workers=workers)
        if kind == "prepared":
            data |= {"path": str(prepared), "data_files": None, "tokenizer": None}
        name = f"{kind}-{workers}-{ranks}-{rows}"
        cell = {"data": data, "ranks": ranks}
        planned.append(cell | {"folder": f"{folder}/{name}/whole"})
        planned.append(cell | {"folder": f"{folder}/{name}/killed", "kill_at": KILLED})
        planned.append(
            cell | {"folder": f"{folder}/{name}/resumed", "from": f"{folder}/{name}/killed/step={SAVED}.ckpt"}
        )
    run_all(planned)
    return folder


@pytest.mark.parametrize(("kind", "workers", "ranks", "rows"), CELLS)
def test_killed_run_resumes_at_the_next_token_with_the_same_loss(runs, kind, workers, ranks, rows):
    folder = runs / f"{kind}-{workers}-{ranks}-{rows}"
    for rank in range(ranks):
        whole, killed, resumed = (log(folder / name, rank) for name in ("whole", "killed", "resumed"))
        assert len(whole) == len(set(whole)) == STEPS * ACCUMULATE
        assert killed == whole[: KILLED * ACCUMULATE]
        assert resumed == whole[SAVED * ACCUMULATE :]
    whole, resumed = (total_counts(folder / name, ranks) for name in ("whole", "resumed"))
    assert whole == resumed
    logged = json.loads((folder / "resumed" / "logged.0").read_text())
    assert {k: v for k, v in logged.items() if k.startswith("data/")} == whole
    tokens = next(count for name, count in whole.items() if name.endswith("tokens"))
    slots = STEPS * ACCUMULATE * ranks * 2 * 32
    assert tokens == slots if rows == "packed" else 0 < tokens < slots


def total_counts(folder: Path, ranks: int) -> dict[str, int]:
    """Sum the counts of all ranks, by the names that the callback logs."""
    total = Counter()
    for rank in range(ranks):
        for source, counts in json.loads((folder / f"counts.{rank}").read_text()).items():
            total.update({f"data/{source}/{kind}": count for kind, count in counts.items()})
    return dict(total)


@pytest.mark.parametrize(("ranks", "rows"), product([1, 2], ["padded", "packed"]))
def test_batches_are_the_same_streamed_and_prepared_with_any_number_of_workers(runs, ranks, rows):
    names = [f"{kind}-{workers}-{ranks}-{rows}" for kind, workers in product(["streamed", "prepared"], [0, 2])]
    for rank in range(ranks):
        assert len({tuple(log(runs / name / "whole", rank)) for name in names}) == 1


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_two_ranks_share_the_sequence_that_one_rank_sees(runs, rows):
    hashes = [[line.split()[1] for line in log(runs / f"streamed-0-{ranks}-{rows}" / "whole", 0)] for ranks in (1, 2)]
    assert hashes[0][::2] == hashes[1][: STEPS * ACCUMULATE // 2]


def test_a_run_on_two_ranks_resumes_on_one(runs, c4, tmp_path):
    """Each step then has half as many rows of the same sequence."""
    checkpoint = f"{runs}/streamed-2-2-packed/killed/step={SAVED}.ckpt"
    data = arguments(c4, rows="packed", num_workers=2)
    run_all([{"folder": f"{tmp_path}/one", "data": data, "ranks": 1, "from": checkpoint}])
    sequences = [log(runs / "streamed-2-2-packed" / "whole", rank) for rank in range(2)]
    whole = [line.split()[1] for both in zip(*sequences, strict=True) for line in both]
    begin = 2 * SAVED * ACCUMULATE
    resumed = [line.split()[1] for line in log(tmp_path / "one", 0)]
    assert resumed == whole[begin : begin + len(resumed)]
    assert len(resumed) == (STEPS - SAVED) * ACCUMULATE


@pytest.mark.parametrize("ranks", [1, 2])
def test_failing_data_leaves_a_checkpoint_to_resume_from(c4, tmp_path, ranks):
    """Only one rank reads the broken line; both stop after the same step."""
    broken = tmp_path / "data"
    shutil.copytree(c4, broken)
    shard = broken / "c4-train.00004-of-00005.json.gz"
    lines = gzip.decompress(shard.read_bytes()).splitlines(keepends=True)
    shard.write_bytes(gzip.compress(b"".join([*lines[:30], b'{"text": "cut of\n', *lines[31:]])))
    data = arguments(broken, num_workers=2, shuffle_buffer=2, num_logical_shards=10)
    cell = {"data": data, "ranks": ranks, "steps": 50 // ranks}
    run_all([cell | {"folder": f"{tmp_path}/failed", "expect": 1}])
    messages = [(tmp_path / "failed" / f"rank{rank}.log").read_text().strip().splitlines()[-1] for rank in range(ranks)]
    assert any("c4-train.00004-of-00005.json.gz line 31 is not JSON" in message for message in messages)
    assert all("StreamError" in message for message in messages)
    [checkpoint] = (tmp_path / "failed").glob("data-failed-step=*.ckpt")
    step = int(checkpoint.stem.split("=")[1])
    shutil.copy(c4 / shard.name, shard)
    run_all(
        [
            cell | {"folder": f"{tmp_path}/whole"},
            cell | {"folder": f"{tmp_path}/resumed", "from": str(checkpoint)},
        ]
    )
    for rank in range(ranks):
        failed, whole, resumed = (log(tmp_path / name, rank) for name in ("failed", "whole", "resumed"))
        assert failed == whole[: step * ACCUMULATE]
        assert resumed == whole[step * ACCUMULATE :]
