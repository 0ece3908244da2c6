import json

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import Unigram, WordLevel
from tokenizers.pre_tokenizers import Metaspace

from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError


def t5_like(folder):
    """Write a unigram tokenizer that has its sentinels in the vocabulary, as T5's has."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((f"▁{c}", -2.0) for c in "abc"),
        *((c, -3.0) for c in "abc_<>/s "),
    ]
    fast = FastTokenizer(Unigram([*pieces, ("<extra_id_0>", -1.0)], unk_id=2))
    fast.pre_tokenizer = Metaspace()
    fast.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "pad_token": "<pad>"}))
    return folder


def test_a_trained_bpe_encodes_any_text_and_is_loaded_from_disk(texts, tmp_path):
    tokenizer = Tokenizer.train(iter(texts), 300)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 300)
    strange = "the naïve 漢字 \x00 😀\n\tend"
    (ids,) = tokenizer.encode([strange])
    assert ids[-1] == 1
    assert tokenizer.decode(ids) == strange
    tokenizer.save(tmp_path / "tokenizer")
    again = Tokenizer.load(str(tmp_path / "tokenizer"))
    assert (again.pad_id, again.eos_id, again.vocab_size) == (0, 1, 300)
    assert again.encode([strange]) == [ids]


def test_t5s_sentinels_count_neither_in_the_vocabulary_size_nor_in_encoded_text(tmp_path):
    tokenizer = Tokenizer.load(str(t5_like(tmp_path / "t5")))
    sentinel = tokenizer.fast.token_to_id("<extra_id_0>")
    assert tokenizer.vocab_size == sentinel
    (ids,) = tokenizer.encode(["a <extra_id_0> b </s> c"])
    assert max(ids) < tokenizer.vocab_size
    assert ids.count(tokenizer.eos_id) == 1
    assert ids[-1] == tokenizer.eos_id


def test_text_that_becomes_a_special_token_by_normalization_gives_no_special_id(tmp_path):
    """t5-base normalizes full-width letters to ASCII, and has its special tokens in the vocabulary."""
    folder = t5_like(tmp_path / "t5")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFKC"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(str(folder))
    plain, wide = tokenizer.encode(["a <extra_id_0> b </s> c", "a ＜extra_id_0＞ b ＜/s＞ c"])
    assert wide == plain
    assert max(wide) < tokenizer.vocab_size
    assert wide.count(tokenizer.eos_id) == 1


def test_the_vocabulary_size_includes_an_unknown_token_of_the_highest_id(tmp_path):
    fast = FastTokenizer(WordLevel({"</s>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    fast.add_special_tokens(["</s>", "<unk>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.encode(["z"]) == [[2, 0]]
    assert tokenizer.vocab_size == 3
    FastTokenizer(Unigram([("</s>", 0.0), ("a", -1.0), ("<unk>", 0.0)], unk_id=2)).save(
        str(tmp_path / "tokenizer.json")
    )
    assert Tokenizer.load(str(tmp_path)).vocab_size == 3


def test_half_of_a_surrogate_pair_is_an_error_that_names_it(tmp_path):
    tokenizer = Tokenizer.train(["a b"], 258)
    with pytest.raises(InputError, match=r"not valid Unicode: '\\ud83d' after 'so '"):
        tokenizer.encode(["fine", "so \ud83d"])


def test_a_vocabulary_too_small_for_bytes_is_refused(texts):
    with pytest.raises(InputError, match="vocab_size 100 is too small for a byte-level BPE; choose 258 or more"):
        Tokenizer.train(texts, 100)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer\.json of the tokenizers library"):
        Tokenizer.load(str(tmp_path))


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    FastTokenizer(Unigram([("a", -1.0), ("b", -1.0)])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="names no eos_token"):
        Tokenizer.load(str(tmp_path))


@pytest.mark.parametrize("kind", ["unigram", "byte-level BPE"])
def test_ids_of_long_and_short_documents_equal_those_of_the_library(kind, texts, tmp_path):
    """The expected ids come from the library's own ``encode`` of each whole text."""
    trained = kind == "byte-level BPE"
    tokenizer = Tokenizer.train(iter(texts), 300) if trained else Tokenizer.load(str(t5_like(tmp_path / "t5")))
    documents = ["", "a", "ab  ba \n\n é 漢字 😀\t c " * 9_000, "abc" * 50_000]
    whole = [tokenizer.fast.encode(text, add_special_tokens=False).ids for text in documents]
    assert tokenizer.encode(documents) == [[*ids, tokenizer.eos_id] for ids in whole]
