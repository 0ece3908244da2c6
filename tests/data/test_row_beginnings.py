"""Padded rows from the beginnings of documents equal those from whole documents."""

import random

import numpy as np
import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from cola_lightning.data.held_out import PREFIX, HeldOut
from cola_lightning.data.packing import RowArrays, RowShape
from cola_lightning.data.row_beginnings import RowBeginnings, is_safe_to_cut
from cola_lightning.data.tokenizer import Tokenizer

# What may join or split near a cut: accents that combine, spaces of many kinds, ligatures, special tokens, no spaces.
PIECES = [
    "the",
    "nation",
    "e\u0301",
    "\u00a0",
    "  ",
    "\n",
    "\ufb01n",
    "</s>",
    "\uff1c/s\uff1e",
    "don't",
    "x.y",
    "\u6f22",
]
PIECES += ["\u2581", "7"]
SPECIAL = ["<pad>", "</s>", "<unk>"]


def texts(number: int) -> list[str]:
    draw = random.Random(number)
    return [
        draw.choice([" ", "", "\n"]).join(draw.choices(PIECES, weights=[9, 9] + [1] * 12, k=draw.randint(0, 400)))
        for _ in range(60)
    ]


def unigram(normalizer, pre_tokenizer) -> Tokenizer:
    fast = FastTokenizer(models.Unigram())
    fast.normalizer, fast.pre_tokenizer = normalizer, pre_tokenizer
    trainer = trainers.UnigramTrainer(vocab_size=200, show_progress=False, special_tokens=SPECIAL, unk_token="<unk>")
    fast.train_from_iterator(texts(1), trainer)
    return Tokenizer(fast, 1, 0, "unigram")


T5 = normalizers.Sequence(
    [normalizers.NFKC(), normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "\u2581")]
)


class Texts:
    """Corpus that only encodes, and counts the characters."""

    title, shards = "texts", ["a"]

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def encode(self, documents):
        self.characters += sum(map(len, documents))
        return [np.array(ids, dtype=np.int32) for ids in self.tokenizer.encode(documents)]


def padded(documents, length):
    rows = RowArrays(len(documents), RowShape(length, packed=False, pad_id=0))
    kept = [rows.pad(row, document) for row, document in enumerate(documents)]
    return rows.ids.tolist(), rows.labels.tolist(), kept


TOKENIZERS = {
    "t5": lambda: unigram(T5, pre_tokenizers.Metaspace()),
    "words": lambda: unigram(None, pre_tokenizers.WhitespaceSplit()),
    "bytes": lambda: Tokenizer.train(texts(1), 300),
}


@pytest.mark.parametrize("length", [2, 8, 32, 64])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_rows_equal_those_of_whole_documents(name, length):
    tokenizer = TOKENIZERS[name]()
    assert is_safe_to_cut(tokenizer)
    documents = texts(2)
    whole = Texts(tokenizer)
    expected = whole.encode(documents)
    held_out = HeldOut(expected[:10])
    part = Texts(tokenizer)
    found = RowBeginnings(part, length, held_out).encode(documents)
    assert padded(found, length) == padded(expected, length)
    assert [held_out.has(ids) for ids in found] == [held_out.has(ids) for ids in expected]
    if length <= 8:
        assert part.characters < whole.characters


def test_a_document_that_only_begins_like_a_held_out_one_is_trained_on():
    tokenizer = Tokenizer.train(texts(1), 300)
    one, other = "the nation " * 100 + "a", "the nation " * 100 + "b"
    corpus = Texts(tokenizer)
    held_out = HeldOut(corpus.encode([one]))
    found = RowBeginnings(corpus, 8, held_out).encode([one, other])
    assert held_out.may_have(found[1])
    assert len(found[1]) > PREFIX
    assert [held_out.has(ids) for ids in found] == [True, False]


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (None, None),  # one piece is the whole text
        (None, pre_tokenizers.Metaspace(split=False)),
        (None, pre_tokenizers.ByteLevel(use_regex=False)),
        (normalizers.Replace("a b", "c"), pre_tokenizers.WhitespaceSplit()),
        (normalizers.NFD(), pre_tokenizers.WhitespaceSplit()),
    ],
)
def test_texts_are_not_cut_for_a_tokenizer_that_may_look_beyond_a_word(normalizer, pre_tokenizer):
    fast = FastTokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    if normalizer is not None:
        fast.normalizer = normalizer
    if pre_tokenizer is not None:
        fast.pre_tokenizer = pre_tokenizer
    assert not is_safe_to_cut(Tokenizer(fast, 2, None, "other"))


def test_texts_are_not_cut_if_an_added_token_holds_a_space():
    fast = FastTokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert is_safe_to_cut(Tokenizer(fast, 2, None, "plain"))
    fast.add_tokens(["a b"])
    assert not is_safe_to_cut(Tokenizer(fast, 2, None, "added"))
