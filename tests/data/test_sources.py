import gzip
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cola_lightning.data.passes import Share
from cola_lightning.data.retry import Retry
from cola_lightning.data.sources import Source, TextCorpus
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from tests.data.conftest import write_shard

TEXTS = [f"document {number}" for number in range(700)]


@pytest.fixture(scope="module")
def tokenizer(c4) -> Tokenizer:
    return Tokenizer.load(f"{c4}/tokenizer")


@pytest.fixture
def open_corpus(tokenizer):
    def open_corpus(path, **others) -> TextCorpus:
        return TextCorpus(Source(str(path), **others), tokenizer, Retry(0, 0))

    return open_corpus


def write(folder: Path, kind: str) -> Path:
    """Write two shards, the first of 400 documents."""
    for number, texts in enumerate((TEXTS[:400], TEXTS[400:])):
        stem = folder / f"train-{number}"
        rows = [{"text": text, "url": "http://x"} for text in texts]
        if kind == "json.gz":
            write_shard(stem.with_suffix(".json.gz"), texts)
        elif kind == "jsonl":
            stem.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), stem.with_suffix(".parquet"), row_group_size=150)
        else:
            stem.with_suffix(".csv").write_text("text,url\n" + "".join(f"{text},x\n" for text in texts))
    return folder


@pytest.mark.parametrize("kind", ["json.gz", "jsonl", "parquet", "csv"])
def test_folder_of_any_format_is_read_from_any_row_in_any_part(tmp_path, open_corpus, kind):
    corpus = open_corpus(write(tmp_path, kind))
    assert [Path(shard).name.split(".")[0] for shard in corpus.shards] == ["train-0", "train-1"]
    if kind == "jsonl":  # the number of a row is the byte at which it begins
        made = (tmp_path / "train-0.jsonl").read_text().splitlines(keepends=True)
        begins = [sum(map(len, made[:row])) for row in range(400)]
        for row in (0, 1, 149, 399):
            assert list(corpus.read(0, begins[row])) == list(zip(begins, TEXTS[:400], strict=True))[row:]
        return
    for start in (0, 1, 149, 150, 299, 399):
        assert list(corpus.read(0, start)) == list(enumerate(TEXTS[:400]))[start:]
        assert list(corpus.read(1, start)) == list(enumerate(TEXTS[400:]))[start:]
        for part in range(3):
            in_part = range(400 * part // 3, 400 * (part + 1) // 3) if kind == "parquet" else range(part, 400, 3)
            expected = [(row, TEXTS[row]) for row in in_part if row >= start]
            assert list(corpus.read(0, start, Share(part, part + 1, 3))) == expected


def test_files_and_text_column_can_be_named(tmp_path, open_corpus):
    write(tmp_path, "parquet")
    corpus = open_corpus("parquet", data_files={"held_out": f"{tmp_path}/*-1*"}, split="held_out", text_column="url")
    assert list(corpus.read(0, 298)) == [(298, "http://x"), (299, "http://x")]


def test_empty_texts_keep_their_rows_and_are_left_out(tmp_path, open_corpus):
    (tmp_path / "train.jsonl").write_text(
        '{"text": ""}\n\n{"text": "a"}\n{"text": null}\n{"text": " \\n"}\n{"text": "b"}\n'
    )
    assert list(open_corpus(tmp_path).read(0)) == [(14, "a"), (59, "b")]


@pytest.mark.parametrize("kind", ["json.gz", "parquet", "csv"])
def test_missing_column_names_shard_and_what_there_is(tmp_path, open_corpus, kind):
    with pytest.raises(InputError, match=r"train-0\..*no (column )?'content' .*url.*set text_column"):
        list(open_corpus(write(tmp_path, kind), text_column="content").read(0))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "un', "line 3 is not JSON: .* at column 13"),
        (b'{"text": 5}', "line 3 holds int under 'text', not text"),
        (b'["text"]', r"line 3 has no 'text' \(it is a list\)"),
        (b'{"text": "\xe9"}', "line 3 is not UTF-8"),
    ],
)
def test_broken_line_names_shard_and_line(tmp_path, open_corpus, line, reason):
    with gzip.open(tmp_path / "train.json.gz", "wb") as file:
        file.write(b'{"text": "a"}\n{"text": "b"}\n' + line + b'\n{"text": "c"}\n')
    read = []
    with pytest.raises(InputError, match=rf"train\.json\.gz {reason}"):
        read.extend(open_corpus(tmp_path).read(0))
    assert read == [(0, "a"), (1, "b")]


def test_parquet_file_that_is_cut_short_is_named(tmp_path, open_corpus):
    write(tmp_path, "parquet")
    corpus = open_corpus(tmp_path)
    file = tmp_path / "train-1.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"train-1\.parquet is not a whole Parquet file"):
        list(corpus.read(1))


def test_a_missing_data_set_or_split_is_an_error(tmp_path, open_corpus):
    with pytest.raises(InputError, match="has no split 'test'; it has train"):
        open_corpus(write(tmp_path, "jsonl"), split="test")
    with pytest.raises(InputError, match=r"json .*(has no file|cannot be opened)"):
        open_corpus("json", data_files=f"{tmp_path}/none-*.json")
    with pytest.raises(InputError, match=r"data set .*/nowhere cannot be opened"):
        open_corpus(tmp_path / "nowhere")


def test_a_missing_or_unnamed_configuration_is_an_error_that_lists_the_configurations(tmp_path, open_corpus):
    folder = write(tmp_path, "jsonl")
    with pytest.raises(InputError, match=r"it has no configuration 'en'; name one of \['default'\] or null"):
        open_corpus(folder, name="en")
    configs = "".join(f"- config_name: {name}\n  data_files: train-{index}.jsonl\n" for index, name in enumerate("ab"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(InputError, match=r"it has several configurations; name one of \['a', 'b'\]"):
        open_corpus(folder)


def test_the_home_folder_is_found_in_paths_and_files(tmp_path, open_corpus, monkeypatch):
    (tmp_path / "text").mkdir()
    write(tmp_path / "text", "jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    for files in ("~/text/*.jsonl", ["~/text/train-0.jsonl", "~/text/train-1.jsonl"], {"train": "~/text/*.jsonl"}):
        assert len(open_corpus("json", data_files=files).shards) == 2
    assert len(open_corpus("~/text").shards) == 2


class Hub(BaseHTTPRequestHandler):
    """Serves the data set ``someone/text`` with the one revision ``main``."""

    def do_GET(self) -> None:
        body, status = b"{}", 404
        if self.path.endswith("/revision/main") or self.path.endswith("/datasets/someone/text"):
            body, status = json.dumps({"id": "someone/text", "sha": "0" * 40, "siblings": []}).encode(), 200
        self.send_response(status)
        if status == 404:
            code = "RevisionNotFound" if "someone/text" in self.path else "RepoNotFound"
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "Invalid rev id: none-such")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args) -> None:
        pass


@pytest.mark.slow
def test_a_revision_that_does_not_exist_is_refused(tmp_path):
    """This needs a new process, because the client reads the hub's address at import."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    code = (
        "from cola_lightning.data.sources import *; from cola_lightning.data.retry import Retry\n"
        "TextCorpus(Source('someone/text', revision='none-such'), None, Retry(0, 0))"
    )
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | hub, capture_output=True, text=True)
    server.shutdown()
    last = result.stderr.strip().splitlines()[-1]
    assert "InputError: data set someone/text at revision 'none-such' cannot be opened" in last, result.stderr
