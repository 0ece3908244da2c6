"""Tokenize only the beginning of a long document, as far as a padded row holds it, to the same ids as the whole.

The ids of a text's beginning are not always the first ids of the whole text. They are if the text is cut between words
and no step of the tokenizer looks beyond a word there. Here a text is cut before one space between two ASCII letters:

- Normalizers: neither letter nor the space combines with a neighbour in NFC, NFKC or SentencePiece's map, and a run of
  spaces that is replaced is longer than one. These are idempotent too: a text that is normalized twice (as
  :class:`Tokenizer` does where normalizing makes a special token) has the same beginning as one normalized once.
- Pre-tokenizers: each of those below splits "x y" before or around the space, so no piece reaches over the cut.
- Models: Unigram, BPE, WordPiece and WordLevel look at one piece at a time.
- Added tokens are searched in the text first; none of them may hold white space, so none reaches over the cut.

:func:`is_safe_to_cut` checks all of this in the tokenizer's own description. Any other tokenizer gets whole texts.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from cola_lightning.data.held_out import PREFIX, HeldOut
from cola_lightning.data.passes import WHOLE, Share
from cola_lightning.data.sources import TextCorpus
from cola_lightning.data.tokenizer import Tokenizer

CHARACTERS_PER_ID = 6
"""Characters kept per id that is wanted. English has 4 to 5, so few texts are cut too short and tokenized again."""
_BETWEEN_WORDS = re.compile("[A-Za-z](?= [A-Za-z])")
_NORMALIZERS = {"NFC", "NFKC", "Lowercase", "Precompiled", "Strip"}
_PRE_TOKENIZERS = {"WhitespaceSplit", "Whitespace"}
_MODELS = {"Unigram", "BPE", "WordPiece", "WordLevel"}


def is_safe_to_cut(tokenizer: Tokenizer) -> bool:
    """Whether a text cut between words has the first ids of the whole text; see the top of this file."""
    content = json.loads(tokenizer.fast.to_str())
    pre_tokenizers = _steps(content["pre_tokenizer"], "pretokenizers")
    return (
        content["model"]["type"] in _MODELS
        and content["model"].get("dropout") in (None, 0)
        and all(map(_is_local_normalizer, _steps(content["normalizer"], "normalizers")))
        and bool(pre_tokenizers)
        and all(map(_splits_words, pre_tokenizers))
        and not any(re.search(r"\s", token["content"]) for token in content["added_tokens"])
    )


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """List a step of a tokenizer, or the steps of a sequence."""
    if step is None:
        return []
    return [inner for one in step[key] for inner in _steps(one, key)] if step["type"] == "Sequence" else [step]


def _is_local_normalizer(step: dict[str, Any]) -> bool:
    return step["type"] in _NORMALIZERS or (step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"})


def _splits_words(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step.get("split", True) is True
    return step["type"] in _PRE_TOKENIZERS or (step["type"] == "ByteLevel" and step.get("use_regex", True) is True)


class RowBeginnings:
    """A corpus of texts for padded rows: of a long text, only the beginning is tokenized.

    Args:
        corpus: The texts; its tokenizer must be safe to cut.
        length: Tokens of a row (T).
        held_out: Documents that are left out of training. A text that begins like one of them is tokenized whole,
            because only its whole ids tell whether it equals one.
    """

    def __init__(self, corpus: TextCorpus, length: int, held_out: HeldOut) -> None:
        self.corpus, self.held_out = corpus, held_out
        self.title, self.shards = corpus.title, corpus.shards
        # Before the end-of-document id there are then at least PREFIX ids, by which held-out documents are found.
        self.length = max(length, PREFIX + 1)

    def read(self, shard: int, start: int = 0, share: Share = WHOLE) -> Iterator[tuple[int, str]]:
        """As :meth:`TextCorpus.read`."""
        return self.corpus.read(shard, start, share)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each document, int32, ended by the end-of-document id. A row of T tokens made of them is that of the
        whole document."""
        beginnings = [self._cut(text) for text in texts]
        documents = self.corpus.encode(beginnings)
        # A row holds T - 1 ids of a longer document and the end-of-document id, which ids made here have too.
        again = [
            index
            for index, ids in enumerate(documents)
            if len(beginnings[index]) < len(texts[index]) and (len(ids) < self.length or self.held_out.may_have(ids))
        ]
        for index, ids in zip(again, self.corpus.encode([texts[index] for index in again]), strict=True):
            documents[index] = ids
        return documents

    def _cut(self, text: str) -> str:
        found = _BETWEEN_WORDS.search(text, self.length * CHARACTERS_PER_ID)
        return text[: found.end()] if found else text
