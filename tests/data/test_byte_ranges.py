"""Plain JSON Lines divided by byte ranges: each line once, and each byte read about once."""

import json
import os
import random
import warnings

import pytest

from cola_lightning.data import lines, remote
from cola_lightning.data.inventory import describe_repeated_reads
from cola_lightning.data.lines import read_lines
from cola_lightning.data.passes import Reader, Share, divide
from cola_lightning.data.prepare import prepare
from cola_lightning.data.prepared import PreparedCorpus
from cola_lightning.data.readers import read_file
from cola_lightning.data.retry import Retry
from cola_lightning.data.sources import Source, TextCorpus
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from tests.data.server import Server


class OneId:
    """Encodes each document as one id, because these tests count what is read."""

    def encode(self, texts):
        return [[1]] * len(texts)


@pytest.fixture
def server(tmp_path):
    remote._without_ranges.clear()
    server = Server(tmp_path)
    server.ranges = "served"
    yield server
    server.close()


def rows_of(number: int) -> list[bytes]:
    """Make lines of very different length, some empty, the last without a newline."""
    draw = random.Random(number)
    lengths = [draw.choice([0, 1, 9, draw.randint(0, 300)]) for _ in range(draw.randint(1, 60))]
    made = [json.dumps({"text": "x" * length}).encode() + b"\n" if length else b"\n" for length in lengths]
    return [*made, b'{"text": "last"}']


def write_shards(folder, count: int, documents: int) -> int:
    """Write files of documents of 100 to 200 bytes; return the bytes of all."""
    draw = random.Random(count)
    for shard in range(count):
        texts = [f"{shard}-{number} " + "y" * draw.randint(80, 180) for number in range(documents)]
        (folder / f"train-{shard:02}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return sum(file.stat().st_size for file in folder.glob("*.jsonl"))


@pytest.mark.parametrize("number", range(12))
def test_ranges_end_to_end_have_each_line_once_wherever_they_are_cut(number, tmp_path):
    made = rows_of(number)
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"".join(made))
    begins = [sum(map(len, made[:index])) for index in range(len(made))]
    size = file.stat().st_size
    for parts in (1, 2, 3, 16, size + 5):
        bounds = [Share(part, part + 1, parts).bounds(size) for part in range(parts)]
        found = [list(read_lines(str(file), *bound)) for bound in bounds]
        assert [line for part in found for line in part] == list(zip(begins, made, strict=True))
        for (begin, end), part in zip(bounds, found, strict=True):
            assert all(begin <= offset < end for offset, _ in part)


@pytest.mark.parametrize("ranges", ["served", "bytes", "none"])
def test_rows_from_a_server_are_the_same_for_each_share_and_start(server, tmp_path, ranges, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 3000)
    monkeypatch.setattr(remote, "TAIL", 100)
    write_shards(tmp_path, 1, 100)
    file, server.ranges = tmp_path / "train-00.jsonl", ranges
    size = file.stat().st_size
    shares = [Share(part, part + 1, 5) for part in range(5)]
    local = [list(read_file(str(file), "text", 0, share, size)) for share in shares]
    assert [text.partition(" ")[0] for part in local for _, text in part] == [f"0-{number}" for number in range(100)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for share, expected in zip(shares, local, strict=True):
            assert list(read_file(f"{server.url}/train-00.jsonl", "text", 0, share, size)) == expected
            after = expected[7][0] + 1
            assert list(read_file(f"{server.url}/train-00.jsonl", "text", after, share, size)) == expected[8:]
    said = [str(one.message) for one in said if "HTTP Range" in str(one.message)]
    assert len(said) == (ranges != "served")


@pytest.mark.parametrize("count", [1, pytest.param(15, marks=pytest.mark.slow)])
def test_a_pass_of_sixteen_logical_shards_reads_each_file_about_once(server, tmp_path, count):
    """Without byte ranges one file was read 16 times, and 15 files twice.

    After its end a range reads the rest of one line.
    """
    size = write_shards(tmp_path, count, 16_000 // count)
    files = [f"{server.url}/train-{shard:02}.jsonl" for shard in range(count)]
    corpus = TextCorpus(Source("json", data_files={"train": files}), OneId(), Retry(0, 0))
    assert corpus.fingerprints  # asks for sizes
    server.sent, seen, ranges = 0, [], 0
    for logical_shard in range(16):
        reader = Reader(corpus, logical_shard, 16, 100, "7")
        ranges += len(reader._stretch(0))
        while (document := reader.next()) is not None:
            seen.append((document.shard, document.row))
    assert len(seen) == len(set(seen)) == 16_000 // count * count
    assert size <= server.sent <= size + ranges * (remote.TAIL + 1)
    assert server.sent < 1.7 * size


def test_a_file_on_a_disk_is_read_from_the_middle(tmp_path, monkeypatch):
    size = write_shards(tmp_path, 1, 2000)
    opened, read = lines.open_file, []

    def counted(name):
        file = opened(name)
        readline = file.readline
        file.readline = lambda limit: read.append(line := readline(limit)) or line
        return file

    monkeypatch.setattr(lines, "open_file", counted)
    for part in range(16):
        list(read_file(f"{tmp_path}/train-00.jsonl", "text", 0, Share(part, part + 1, 16), size))
    # Each range but the first also reads the line that is cut at its beginning.
    assert size < sum(map(len, read)) <= size + 15 * 220


@pytest.mark.parametrize(("count", "logical_shards"), [(1, 16), (15, 16), (20, 16), (32, 16), (100, 16)])
def test_the_run_reports_how_often_compressed_files_are_read(count, logical_shards):
    names = [f"{number}.jsonl.gz" for number in range(count)]
    times = sum(len(divide(names, number, logical_shards)) for number in range(logical_shards)) / count
    said = describe_repeated_reads("text", names, logical_shards)
    assert len(said) == (times >= 1.25)
    assert all(f"a pass reads each {times:.1f} times" in line for line in said)
    assert not describe_repeated_reads("text", [name.removesuffix(".gz") for name in names], logical_shards)


@pytest.mark.parametrize("at", ["disk", "server"])
def test_a_broken_line_within_a_range_is_named(server, tmp_path, at):
    made = [b'{"text": "fine"}\n'] * 90 + [b'{"text": 5}\n'] + [b'{"text": "fine"}\n'] * 9
    (tmp_path / "a.jsonl").write_bytes(b"".join(made))
    name, place = (f"{tmp_path}/a.jsonl", "line 91") if at == "disk" else (f"{server.url}/a.jsonl", "line at byte 1530")
    with pytest.raises(InputError, match=rf"a\.jsonl {place} holds int under 'text', not text"):
        list(read_file(name, "text", 0, Share(4, 5, 5), os.path.getsize(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(("kind", "name"), [("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")])
def test_utf_16_is_recognized_within_a_range(tmp_path, kind, name):
    (tmp_path / "a.jsonl").write_bytes(('{"text": "fine"}\n' * 50).encode(kind))
    with pytest.raises(InputError, match=rf"line \d+ is not UTF-8, but {name};"):
        list(read_file(f"{tmp_path}/a.jsonl", "text", 0, Share(1, 2, 2), os.path.getsize(tmp_path / "a.jsonl")))


@pytest.mark.slow
def test_prepared_rows_are_those_of_the_stream(c4, tmp_path):
    write_shards(tmp_path, 2, 40)
    with (tmp_path / "train-00.jsonl").open("a") as file:
        file.write('\n{"text": ""}\n{"text": null}\n{"text": "the end"}')
    source = Source("json", data_files=f"{tmp_path}/*.jsonl")
    prepare(source, f"{tmp_path}/made", tokenizer=f"{c4}/tokenizer", num_workers=1)
    text = TextCorpus(source, Tokenizer.load(f"{c4}/tokenizer"), Retry(0, 0))
    made = PreparedCorpus(Source(f"{tmp_path}/made"))
    made.verify()
    for shard in range(2):
        for share in [Share(), *(Share(part, part + 1, 3) for part in range(3))]:
            rows = list(text.read(shard, 0, share))
            for start in (0, rows[5][0], rows[5][0] + 1):
                wanted = [(row, some) for row, some in rows if row >= start]
                found = list(made.read(shard, start, share))
                assert [row for row, _ in found] == [row for row, _ in wanted]
                assert [ids.tolist() for _, ids in found] == [
                    ids.tolist() for ids in text.encode([some for _, some in wanted])
                ]
