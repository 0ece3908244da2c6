"""Compressed, damaged and unusual input, read as whole files and as the shards of a stream."""

import bz2
import gzip
import json
import lzma
import sys
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cola_lightning.data import text_values
from cola_lightning.data.documents import read_documents
from cola_lightning.data.passes import WHOLE
from cola_lightning.data.readers import read_file
from cola_lightning.data.retry import Retry
from cola_lightning.data.sources import Source, TextCorpus
from cola_lightning.errors import InputError
from tests.data.server import Server

READ = {
    "files": lambda file: list(read_documents([file])),
    "shards": lambda file: [text for _, text in read_file(str(file), "text", 0, WHOLE)],
}
both = pytest.mark.parametrize("read", READ.values(), ids=READ.keys())
LINES = [f'{{"text": "document {number}"}}\n'.encode() for number in range(2000)]


@both
@pytest.mark.parametrize("end", ["jsonl", "jsonl.gz", "jsonl.zst", "json.zst"])
def test_compressed_files_of_one_or_several_frames_are_read(read, end, tmp_path):
    halves = [b"".join(LINES[:1500]), b"".join(LINES[1500:])]
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(end.rpartition(".")[2], bytes)
    (tmp_path / f"a.{end}").write_bytes(b"".join(map(pack, halves)))
    assert read(tmp_path / f"a.{end}") == [f"document {number}" for number in range(2000)]


@both
def test_names_of_files_may_contain_question_marks_and_hashes(read, tmp_path):
    for name in ("a#1.jsonl.gz", "b?c.jsonl.gz", "d 100%.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(LINES[0]))
        assert read(tmp_path / name) == ["document 0"]


def test_a_folder_of_zstd_shards_is_a_data_set(tmp_path):
    for split in ("train", "validation"):
        content = zstandard.ZstdCompressor().compress(b"".join(LINES[:5]))
        (tmp_path / f"{split}-0.jsonl.zst").write_bytes(content)
    corpus = TextCorpus(Source(str(tmp_path)), None, Retry(0, 0))
    assert [text for _, text in corpus.read(0)] == [f"document {number}" for number in range(5)]


@both
@pytest.mark.parametrize(
    ("end", "pack"), [("gz", gzip.compress), ("zst", zstandard.ZstdCompressor().compress)], ids=["gz", "zst"]
)
def test_a_truncated_or_uncompressed_file_is_an_error_at_once(read, end, pack, tmp_path):
    file = tmp_path / f"a.jsonl.{end}"
    whole = pack(b"".join(LINES))
    file.write_bytes(whole[:-9])
    with pytest.raises(InputError, match=rf"a\.jsonl\.{end} is cut short or damaged"):
        read(file)
    file.write_bytes(whole + pack(LINES[0])[:6])  # cut inside a later frame
    with pytest.raises(InputError, match=rf"a\.jsonl\.{end} is cut short or damaged"):
        read(file)
    file.write_bytes(b"".join(LINES))
    with pytest.raises(InputError, match=rf"a\.jsonl\.{end} is not compressed as its name says .*; rename it"):
        read(file)


@pytest.mark.parametrize("ranges", ["none", "bytes"])
@pytest.mark.parametrize(
    ("end", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)]
)
def test_lines_of_a_server_are_read_from_any_row(ranges, end, pack, tmp_path):
    (tmp_path / f"a.jsonl{end}").write_bytes(pack(b"".join(LINES)))
    server = Server(tmp_path)
    server.ranges = ranges
    found = READ["shards"](f"{server.url}/a.jsonl{end}")
    server.close()
    assert found == [f"document {number}" for number in range(2000)]


@pytest.mark.parametrize(("end", "pack"), [("xz", lzma.compress), ("bz2", bz2.compress)])
def test_damaged_shards_of_xz_and_bz2_are_named(end, pack, tmp_path):
    file = tmp_path / f"a.jsonl.{end}"
    for content in (pack(b"".join(LINES))[:-20], b"".join(LINES)):
        file.write_bytes(content)
        with pytest.raises(InputError, match=rf"a\.jsonl\.{end} is cut short or damaged"):
            READ["shards"](file)


def test_a_damaged_local_file_is_not_retried(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    (tmp_path / "train.json.gz").write_bytes(LINES[0])
    corpus = TextCorpus(Source(str(tmp_path)), None, Retry())
    with pytest.raises(InputError, match="is not compressed as its name says"):
        list(corpus.read(0))


@both
def test_zstd_without_a_package_names_the_extra(read, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(LINES[0]))
    for module in ("zstandard", "backports.zstd", "backports", "compression"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"needs one more package; run: pip install 'cola-lightning\[zstd\]'"):
        read(tmp_path / "a.jsonl.zst")


@both
def test_half_of_a_surrogate_pair_becomes_the_replacement_character_with_a_warning(read, tmp_path):
    texts = ["\ud83d is half", "\ude00\ud83d is none", "\U0001f600 is whole"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["plain", *texts]))
    text_values._repaired.clear()
    with pytest.warns(UserWarning, match=r"a\.jsonl line 2 holds half of a surrogate pair \('\\ud83d'\)") as said:
        found = read(file)
    # UTF-16's decoder makes the same repair.
    assert found == ["plain"] + [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    assert len(said) == 1


@both
def test_a_byte_order_mark_is_left_out(read, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES[0])
    with warnings.catch_warnings(action="error"):
        assert read(tmp_path / "a.jsonl") == ["document 0"]


@both
@pytest.mark.parametrize("kind", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(read, kind, tmp_path):
    name = "UTF-16" if "16" in kind else "UTF-32"
    (tmp_path / "a.jsonl").write_bytes(LINES[0].decode().encode(kind))
    with pytest.raises(InputError, match=rf"a\.jsonl line 1 is not UTF-8, but {name}.*; convert it: iconv -f {name}"):
        read(tmp_path / "a.jsonl")


@both
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a\0b"}', "line 2 holds NUL bytes"),
        (b"\0" * 40, "line 2 holds NUL bytes"),
        (b"[" * 100_000, "line 2 is nested too deep"),
        (b'{"text": ' + b"9" * 6000 + b"}", "line 2 holds float under 'text', not text"),
    ],
)
def test_lines_that_cannot_be_read_are_named(read, line, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES[0] + line + b"\n")
    with pytest.raises(InputError, match=rf"a\.jsonl {message}"):
        read(tmp_path / "a.jsonl")


@both
def test_a_number_of_thousands_of_digits_beside_the_text_is_ignored(read, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a", "id": ' + b"9" * 6000 + b', "n": 1}\n')
    assert read(tmp_path / "a.jsonl") == ["a"]


@both
def test_bad_utf_8_in_parquet_is_named(read, tmp_path):
    cells = pa.array([b"fine", b"caf\xe9"]).cast(pa.binary()).view(pa.utf8())
    pq.write_table(pa.table({"text": cells}), tmp_path / "a.parquet")
    with pytest.raises(
        InputError, match=r"a\.parquet row 1 holds under 'text' what is not UTF-8: byte 0xe9 at offset 3"
    ):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfone\r\ntwo\rthree", "one\ntwo\nthree"),
        ("one two".encode("utf-16"), r"a\.txt is not UTF-8: .*, but UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
        ("one two".encode("utf-16-le"), r"a\.txt is not UTF-8, but UTF-16LE; convert it: iconv -f UTF-16LE"),
        (b"one two three\0four", r"a\.txt holds NUL bytes, the first at offset 13"),
    ],
)
def test_plain_text_is_decoded_or_refused(content, expected, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    if content.startswith(text_values.BOM):
        assert READ["files"](tmp_path / "a.txt") == [expected]
    else:
        with pytest.raises(InputError, match=expected):
            READ["files"](tmp_path / "a.txt")


def test_a_data_set_that_is_a_script_is_not_run(tmp_path):
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(InputError, match=r"scripted is a script, and no code of a data set is run; .*convert/parquet"):
        TextCorpus(Source(str(folder)), None, Retry(0, 0))
