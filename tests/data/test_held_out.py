"""Held-out text is not trained on, and a run reports the files that it found and left out."""

import json
import logging
import os
from pathlib import Path

import pytest

from cola_lightning.data import C4DataModule, Source, TextDataModule
from cola_lightning.data.held_out import ONE_IN, may_be_held_out
from cola_lightning.data.packing import IGNORE
from cola_lightning.data.prepare import prepare
from cola_lightning.errors import InputError
from tests.data.conftest import arguments, sentences, write_shard
from tests.data.test_streaming import ready, take


def rows(batches) -> set[tuple[int, ...]]:
    """Return the rows, of one document each, without padding."""
    return {
        tuple(ids[labels != IGNORE].tolist())
        for batch in batches
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        if (labels != IGNORE).any()
    }


def streamed(c4, **others) -> C4DataModule:
    return C4DataModule(**arguments(c4, sequence_length=256, num_workers=0, **others))


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(3):
        write_shard(tmp_path / "text" / f"train-{number}.json.gz", sentences(f"n{number}", 200))
    return tmp_path / "text"


@pytest.fixture(autouse=True)
def make_folder(tmp_path):
    (tmp_path / "text").mkdir()


@pytest.mark.parametrize("kind", ["streamed", "prepared"])
def test_validation_on_the_training_split_holds_out_documents_by_hash(c4, tmp_path, folder, kind):
    """FineWeb, for example, has only the split train."""
    path = str(folder)
    if kind == "prepared":
        path = str(tmp_path / "made")
        prepare(Source(str(folder)), path, ["train"], f"{c4}/tokenizer", num_workers=1)
    others = {"path": path, "data_files": None, "tokenizer": f"{c4}/tokenizer" if kind == "streamed" else None}
    others |= {"validation": Source(path, split="train"), "validation_tokens": 10**6, "cache_dir": str(tmp_path)}
    data = ready(streamed(c4, **others))
    held_out = rows(data.val_dataloader())
    trained = rows(take(data, 600))
    due = sum(may_be_held_out(f"train-{number}.json.gz", row) for number in range(3) for row in range(200))
    assert len(held_out) == due == pytest.approx(600 / ONE_IN, abs=12)
    assert len(trained) == 600 - due
    assert not held_out & trained
    # 1,200 rows are more than two passes. Each pass leaves those documents out.
    left_out = data.source_counts()[data.sources.training[0].title]["held_out"]
    assert 2 * due <= left_out <= 3 * due


def test_copies_of_validation_documents_are_not_trained_on_and_counted(c4, tmp_path, folder):
    texts = sentences("v", 40)
    write_shard(folder / "train-3.json.gz", [*sentences("w", 30), *texts[:20]])
    held_out = Source("json", split="validation", data_files=arguments(c4)["data_files"])
    data = ready(streamed(c4, path=str(folder), data_files=None, validation=held_out, validation_tokens=10**6))
    validation = rows(data.val_dataloader())
    assert len(validation) == 40
    trained = rows(take(data, 315))  # each of the 630 other documents once
    assert len(trained) == 630
    assert not validation & trained
    assert data.source_counts()[str(folder)] == data.source_counts()[str(folder)] | {"documents": 630, "held_out": 20}
    state = json.loads(json.dumps(data.state_dict()))
    again = streamed(c4, path=str(folder), data_files=None, validation=held_out, validation_tokens=10**6)
    again.load_state_dict(state)
    assert ready(again).source_counts() == data.source_counts()


def test_every_document_held_out_is_an_error(c4, tmp_path, folder):
    files = {"train": f"{folder}/train-0*", "validation": f"{folder}/train-0*"}
    data = ready(streamed(c4, data_files=files, validation_tokens=10**6, cache_dir=str(tmp_path)))
    with pytest.raises(InputError, match="json has no document; every one is held out for validation"):
        take(data, 1)


def test_training_documents_that_equal_a_validation_document_are_left_out_of_text_files(tmp_path, folder):
    (folder / "held.txt").write_text("a text that is held out")
    (folder / "copy.txt").write_text("a text that is held out\n")
    for hidden in (".ipynb_checkpoints", ".git"):
        (folder / hidden).mkdir()
        (folder / hidden / "held.txt").write_text("a text in a hidden folder")
    (folder / "._held.txt").write_bytes(b"\0\5\26\7 not text")
    data = TextDataModule(
        paths=[str(folder)], validation_paths=[f"{folder}/held.txt"], vocab_size=300, cache_dir=f"{tmp_path}/c"
    )
    with pytest.warns(UserWarning, match="2 of 602 training documents equal a validation document; they are not"):
        data.prepare_data()
    data.setup("validate")
    assert len(data.train_rows.documents.offsets) - 1 == 600
    assert len(data.validation_rows.documents.offsets) - 1 == 1


def test_a_run_reports_the_files_that_it_found_and_left_out(c4, tmp_path, folder, caplog):
    (folder / "train-9.json.gz.part").write_text("x")
    (folder / "notes.bak").write_text("x")
    (folder / ".git").mkdir()
    os.symlink(tmp_path, folder / "elsewhere")
    size = sum(file.stat().st_size for file in folder.glob("*.json.gz"))
    held_out = Source("json", split="validation", data_files=arguments(c4)["data_files"])
    with caplog.at_level(logging.INFO):
        data = ready(streamed(c4, path=str(folder), data_files=None, validation=held_out))
    found = [line for line in caplog.messages if line.startswith(("train on", "validate on"))]
    assert found[0] == f"train on {folder}: 3 files, {size / 1000:.1f} kB"
    assert found[1] == (
        f"train on {folder}: left out in {folder}: 1 hidden folder (.git); 1 linked folder (elsewhere); "
        f"2 other files (notes.bak, train-9.json.gz.part)"
    )
    assert found[2].startswith(
        f"train on {folder}: 3 compressed files for 4 logical shards; a pass reads each 2.0 times"
    )
    assert found[3].startswith("validate on json: 1 file, ")
    documents, ids = data._validation_documents, data._validation_documents.ids
    assert found[4] == f"validate on {len(documents)} documents, {len(ids)} tokens of json"


def test_a_run_reports_files_that_patterns_match_twice_and_files_that_are_not_read(c4, tmp_path, folder, caplog):
    (folder / "train-9.json.gz.part").write_text("x")
    files = {"train": [f"{folder}/*", f"{folder}/train-[01]*"], "validation": f"{c4}/c4-validation*"}
    with caplog.at_level(logging.INFO):
        data = ready(streamed(c4, data_files=files))
    assert len(data.sources.corpora[0].shards) == 3
    assert "train on json: 2 files named more than once, read once" in caplog.messages
    assert "train on json: left out: 1 other file (train-9.json.gz.part)" in caplog.messages


def test_text_files_are_counted_and_left_out_files_are_reported(tmp_path, folder, caplog):
    (folder / "notes.bak").write_text("x")
    (folder / "more").mkdir()
    (folder / "more" / "one.txt").write_text("one more text")
    paths = [f"{folder}/*", f"{folder}/train-[01]*", f"{folder}/more"]
    data = TextDataModule(paths=paths, validation_fraction=0.1, vocab_size=300, cache_dir=f"{tmp_path}/c")
    with caplog.at_level(logging.INFO):
        data.prepare_data()
        data.setup("fit")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.name.endswith((".gz", ".txt")))
    names = ", ".join(paths)
    assert [line for line in caplog.messages if line.startswith("train on")] == [
        f"train on {names}: 4 files, {size / 1000:.1f} kB",
        f"train on {names}: 2 files named more than once, read once",
        f"train on {names}: left out: 1 other file (notes.bak)",
        f"train on 541 documents, {len(data.train_rows.documents.ids):,} tokens",
    ]
    assert caplog.messages[-1].startswith("validate on 60 documents, ")
