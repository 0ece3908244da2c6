import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from cola_lightning.cli.app import main
from cola_lightning.data.passes import Share
from cola_lightning.data.prepare import prepare
from cola_lightning.data.prepared import PreparedCorpus, is_prepared
from cola_lightning.data.retry import Retry
from cola_lightning.data.sources import Source, TextCorpus
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from tests.data.conftest import sentences, write_shard
from tests.data.server import Server
from tests.data.test_stream_loader import alive

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path) -> Source:
    (tmp_path / "text").mkdir()
    for number in range(3):
        write_shard(tmp_path / "text" / f"train-{number}.json.gz", [*sentences(f"{number}", 30), "", "end"])
    return Source(str(tmp_path / "text"))


@pytest.fixture
def run(source, c4, tmp_path):
    def run(**others) -> Path:
        prepare(
            **(
                {"source": source, "folder": f"{tmp_path}/made", "tokenizer": f"{c4}/tokenizer", "num_workers": 1}
                | others
            )
        )
        return tmp_path / "made" / "train"

    return run


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_prepared_shards_hold_what_the_source_yields_in_its_rows(source, c4, run, num_workers):
    folder = run(num_workers=num_workers)
    text = TextCorpus(source, Tokenizer.load(f"{c4}/tokenizer"), Retry())
    corpus = PreparedCorpus(Source(str(folder.parent)))
    corpus.verify()
    assert corpus.shards == text.shards
    for shard in range(3):
        for start, *share in ((0, 0, 1, 1), (7, 0, 1, 1), (7, 1, 3, 3), (31, 0, 1, 1), (40, 1, 2, 2)):
            rows, texts = zip(*text.read(shard, start, Share(*share)), strict=True) if start < 32 else ((), ())
            prepared = list(corpus.read(shard, start, Share(*share)))
            assert tuple(row for row, _ in prepared) == rows
            expected, ids = text.encode(list(texts)), corpus.encode([ids for _, ids in prepared])
            assert all((one == other).all() for one, other in zip(expected, ids, strict=True))
            assert all(one.dtype == np.int32 for one in ids)
    assert corpus.index["documents"] == 93
    assert corpus.index["tokens"] == sum(len(ids) for shard in range(3) for _, ids in corpus.read(shard))
    assert corpus.tokenizer().fingerprint() == text.tokenizer.fingerprint()


@pytest.mark.parametrize("name", ["00001.ids.bin", "00002.offsets.npy"])
def test_a_corrupted_shard_is_named(run, name):
    folder = run()
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is corrupted: its SHA-256 is .*; delete .*{name[:5]}\.json"):
        PreparedCorpus(Source(str(folder.parent))).verify()
    (folder / f"{name[:5]}.json").unlink()
    PreparedCorpus(Source(str(run().parent))).verify()


def test_a_truncated_or_missing_shard_is_named_without_hashing(run):
    folder = run()
    (folder / "00001.ids.bin").write_bytes(b"12")
    with pytest.raises(InputError, match=r"00001\.ids\.bin has 2 bytes, not"):
        PreparedCorpus(Source(str(folder.parent)))
    (folder / "00001.ids.bin").unlink()
    with pytest.raises(InputError, match=r"00001\.ids\.bin is missing"):
        PreparedCorpus(Source(str(folder.parent)))


def test_a_broken_shard_stops_prepare_and_a_second_call_makes_only_missing_shards(source, run, tmp_path):
    file = tmp_path / "text" / "train-2.json.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:200])
    with pytest.raises(InputError, match=r"train-2\.json\.gz"):
        run(num_workers=1, retries=0)
    folder = tmp_path / "made" / "train"
    assert is_prepared(Source(str(folder.parent)))
    with pytest.raises(InputError, match="was not prepared to the end"):
        PreparedCorpus(Source(str(folder.parent)))
    before = {name: (folder / name).stat().st_mtime_ns for name in ("00000.ids.bin", "00001.ids.bin")}
    file.write_bytes(whole)
    run()
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}
    PreparedCorpus(Source(str(folder.parent))).verify()
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_changed_shard_is_made_again_also_after_an_interruption(source, run, tmp_path, interrupted, c4):
    last = tmp_path / "text" / "train-2.json.gz"
    whole = last.read_bytes()
    if interrupted:
        last.write_bytes(whole[:200])
        with pytest.raises(InputError, match="cut short or damaged"):
            run()
        last.write_bytes(whole)
    else:
        run()
    folder = tmp_path / "made" / "train"
    before = {name: (folder / name).stat().st_mtime_ns for name in ("00000.ids.bin", "00001.ids.bin")}
    write_shard(tmp_path / "text" / "train-1.json.gz", sentences("changed", 30))
    with pytest.warns(UserWarning, match=r"1 of 3 shards changed since they were tokenized, the first .*train-1"):
        run()
    corpus, text = (
        PreparedCorpus(Source(str(folder.parent))),
        TextCorpus(source, Tokenizer.load(f"{c4}/tokenizer"), Retry()),
    )
    corpus.verify()
    for shard in range(3):
        _, texts = zip(*text.read(shard), strict=True)
        expected = text.encode(list(texts))
        assert all((one == ids).all() for one, (_, ids) in zip(expected, corpus.read(shard), strict=True))
    assert (folder / "00000.ids.bin").stat().st_mtime_ns == before["00000.ids.bin"]
    assert (folder / "00001.ids.bin").stat().st_mtime_ns > before["00001.ids.bin"]


def test_a_folder_with_missing_shards_has_no_index(source, run, tmp_path):
    folder = run()
    (tmp_path / "text" / "train-1.json.gz").write_bytes(b"no gzip at all")
    with pytest.warns(UserWarning, match="1 of 3 shards changed"), pytest.raises(InputError, match="not compressed"):
        run()
    with pytest.raises(InputError, match="was not prepared to the end"):
        PreparedCorpus(Source(str(folder.parent)))


def test_a_folder_of_another_preparation_is_refused(source, c4, run, tmp_path):
    run()
    other = Tokenizer.train(["a few other words"], 260)
    other.save(tmp_path / "other")
    with pytest.raises(InputError, match="was begun with another tokenizer"):
        run(tokenizer=f"{tmp_path}/other")
    with pytest.raises(InputError, match="holds something else"):
        run(folder=f"{tmp_path}", source=Source(source.path, split="text", data_files={"text": f"{source.path}/*"}))


def test_damaged_records(source, run):
    folder = run()
    (folder / "index.json").write_text('{"format": 2, "sha')
    with pytest.raises(InputError, match=r"index\.json cannot be read as JSON: .*; delete it, and run the same"):
        PreparedCorpus(Source(str(folder.parent)))
    (folder / "00001.json").write_text("{")
    PreparedCorpus(Source(str(run().parent))).verify()
    (folder / "plan.json").write_text("[")
    with pytest.raises(InputError, match=r"plan\.json cannot be read as JSON: .*; choose another --folder"):
        run()


def test_a_source_without_a_document_is_refused(run, tmp_path, source):
    write_shard(tmp_path / "empty.json.gz", ["", " "])
    with pytest.raises(InputError, match="has no document; every text is empty"):
        run(source=Source("json", data_files=f"{tmp_path}/empty.json.gz"))


@pytest.mark.slow
def test_the_command_is_killed_and_run_again(c4, tmp_path):
    """SIGKILL comes while the workers wait for a server. Finished shards stay, and the workers end too."""
    names = [f"train-{number}.json.gz" for number in range(6)]
    for name in names:
        write_shard(tmp_path / name, sentences(name, 30))
    server, answers = Server(tmp_path), threading.Event()
    server.faults |= {name: [None, answers] for name in names[3:]}  # the first GET is a check
    settings = {
        "source": {"path": "json", "data_files": [f"{server.url}/{name}" for name in names]},
        "folder": f"{tmp_path}/made",
        "tokenizer": f"{c4}/tokenizer",
    }
    config = tmp_path / "prepare.yaml"
    config.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "cola_lightning", "prepare", "--config", str(config), "--num_workers", "2"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    folder = tmp_path / "made" / "train"
    while len(list(folder.glob("000*.json"))) < 3 or [*map(server.requests.count, names[3:5])] != [2, 2]:
        assert process.poll() is None
        time.sleep(0.05)
    children = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {file: file.stat().st_mtime_ns for file in folder.glob("000*.ids.bin")}
    assert [file.name for file in sorted(finished)] == [f"{number:05}.ids.bin" for number in range(3)]
    assert len(children) >= 2
    until = time.monotonic() + 60
    while any(alive(child) for child in children) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(alive(child) for child in children)
    assert not (folder / "index.json").exists()
    answers.set()
    main(["prepare", "--config", str(config), "--num_workers=1"])
    server.close()
    assert finished.items() <= {file: file.stat().st_mtime_ns for file in folder.glob("000*.ids.bin")}.items()
    corpus = PreparedCorpus(Source(f"{tmp_path}/made"))
    corpus.verify()
    assert corpus.index["documents"] == 6 * 30


def children_of(process: int) -> list[int]:
    """List the child processes of a process."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a process may end at this moment
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return [child for child, parent in parents.items() if parent == process]


def test_no_workers_is_refused(run):
    with pytest.raises(InputError, match="num_workers is 0"):
        run(num_workers=0)
