import json
import os
import shutil

import pytest

from cola_lightning.data import TextDataModule
from cola_lightning.data.fingerprints import _of_disk
from cola_lightning.errors import InputError
from tests.data.conftest import fake_trainer


def module(paths, tmp_path, **settings):
    settings = {
        "vocab_size": 300,
        "sequence_length": 16,
        "batch_size": 2,
        "cache_dir": str(tmp_path / "cache"),
    } | settings
    data = TextDataModule([str(path) for path in paths], **settings)
    data.trainer = fake_trainer(max_steps=3, accumulate_grad_batches=2)
    data.prepare_data()
    data.setup("fit")
    return data


def documents(rows, tokenizer):
    return {tokenizer.decode(rows.documents[i].tolist()) for i in range(len(rows.documents))}


def test_holds_out_documents_before_packing(corpus, texts, tmp_path):
    data = module([corpus], tmp_path, rows="padded", validation_fraction=0.1, sequence_length=400)
    train, held_out = documents(data.train_rows, data.tokenizer), documents(data.validation_rows, data.tokenizer)
    assert len(held_out) == 4
    assert not train & held_out
    assert train | held_out == set(texts)


def test_packed_and_padded_rows_hold_the_same_tokens(corpus, tmp_path):
    packed = module([corpus], tmp_path, rows="packed")
    padded = module([corpus], tmp_path, rows="padded", sequence_length=400)
    kept = lambda rows: sum(int((rows[i]["labels"] >= 0).sum()) for i in range(len(rows)))  # noqa: E731
    assert kept(packed.train_rows) == kept(padded.train_rows)


def test_the_loader_is_as_long_as_the_run_and_its_position_is_saved(corpus, tmp_path):
    data = module([corpus], tmp_path)
    loader = data.train_dataloader()
    assert len(loader) == 6
    iterator = iter(loader)
    batches = [next(iterator) for _ in range(3)]
    again = module([corpus], tmp_path)
    again.load_state_dict(json.loads(json.dumps(data.state_dict())))
    assert again.state_dict()["position"] == 6
    following = next(iter(again.train_dataloader()))
    assert following["input_ids"].tolist() == next(iterator)["input_ids"].tolist()
    assert following["input_ids"].tolist() != batches[0]["input_ids"].tolist()


def test_text_is_tokenized_once_and_again_after_it_changed(texts, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    first = module([file], tmp_path)
    tokenized = list((tmp_path / "cache").iterdir())
    assert len(tokenized) == 1
    stamp = (tokenized[0] / "train").stat().st_mtime_ns
    module([file], tmp_path, sequence_length=32)
    assert (tokenized[0] / "train").stat().st_mtime_ns == stamp
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts[:10]))
    second = module([file], tmp_path)
    assert len(second.train_rows) < len(first.train_rows)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_copy_of_the_text_takes_the_cache(texts, tmp_path):
    """Small files are known by their content, so that text and cache can move to another machine."""
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    module([file], tmp_path)
    [made] = (tmp_path / "cache").iterdir()
    os.utime(file, (1, 1))
    (tmp_path / "elsewhere").mkdir()
    for place in (file, shutil.copy(file, tmp_path / "elsewhere")):
        module([place], tmp_path)
        assert list((tmp_path / "cache").iterdir()) == [made]


def test_a_changed_tokenizer_is_noticed(corpus, texts, tmp_path):
    for size in (300, 280):
        module([corpus], tmp_path, vocab_size=size).tokenizer.save(tmp_path / "tokenizer")
        assert module([corpus], tmp_path, tokenizer=str(tmp_path / "tokenizer")).tokenizer.vocab_size == size
        ids = module([corpus], tmp_path, tokenizer=str(tmp_path / "tokenizer")).train_rows.documents.ids
        assert ids.max() < size


def test_another_end_of_document_beside_the_same_tokenizer_is_noticed(corpus, tmp_path):
    folder = tmp_path / "tokenizer"
    module([corpus], tmp_path).tokenizer.save(folder)
    ends = []
    for eos in ("</s>", "a"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        data = module([corpus], tmp_path, tokenizer=str(folder), rows="padded")
        assert data.tokenizer.fast.id_to_token(data.tokenizer.eos_id) == eos
        ends.append({int(document[-1]) for document in map(data.train_rows.documents.__getitem__, range(5))})
    assert ends == [{1}, {data.tokenizer.eos_id}]


@pytest.mark.parametrize("name", ["train/data-00000-of-00001.arrow", "tokenizer/tokenizer.json", "ids.json"])
def test_a_damaged_cache_is_made_again_with_a_warning(corpus, tmp_path, name):
    first = module([corpus], tmp_path)
    [folder] = (tmp_path / "cache").iterdir()
    content = (folder / name).read_bytes()
    (folder / name).unlink()  # the file itself is mapped into memory
    (folder / name).write_bytes(content[:20])
    with pytest.warns(UserWarning, match=rf"the cache {folder} is damaged .*, and is made anew"):
        again = module([corpus], tmp_path)
    assert (again.train_rows.documents.ids == first.train_rows.documents.ids).all()


def test_text_of_the_same_size_and_time_is_noticed(texts, tmp_path):
    file = tmp_path / "a.jsonl"
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    seen = set()
    for content in (lines, lines.replace("congress", "Congress")):
        file.write_text(content)
        os.utime(file, (1, 1))
        _of_disk.cache_clear()
        seen |= documents(module([file], tmp_path, rows="padded").train_rows, module([file], tmp_path).tokenizer)
    assert any("Congress" in text for text in seen)


def test_validation_files_can_be_named(corpus, tmp_path):
    (tmp_path / "held.txt").write_text("the war and the peace")
    data = module([corpus], tmp_path, validation_paths=[str(tmp_path / "held.txt")], rows="padded", sequence_length=400)
    assert documents(data.validation_rows, data.tokenizer) == {"the war and the peace"}
    assert len(data.train_rows) == 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"only one document", "holds a single document, so none can be held out"),
        (b"  \n ", "holds no text"),
        (b"caf\xe9", r"a\.txt is not UTF-8"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_named_before_training(content, message, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        module([tmp_path / "a.txt"], tmp_path)
    assert not [path for path in (tmp_path / "cache").iterdir()]


def test_a_bad_file_after_a_good_one_is_named(corpus, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"bad\.txt is not UTF-8"):
        module([corpus, tmp_path / "bad.txt"], tmp_path)


@pytest.mark.parametrize(
    "settings", [{"sequence_length": 1}, {"batch_size": 0}, {"validation_fraction": 1.0}, {"seed": -1}, {"seed": 2**32}]
)
def test_invalid_settings_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        TextDataModule(["x"], **settings)
