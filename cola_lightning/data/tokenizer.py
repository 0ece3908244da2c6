"""Turn text into ids and back, by any tokenizer in Hugging Face's format, or by a byte-level BPE trained here."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from cola_lightning.data.retry import Retry
from cola_lightning.data.tokenizer_files import (
    check_file_size,
    find_tokenizer_files,
    read_object,
    read_settings,
    token_content,
)
from cola_lightning.errors import InputError

PAD, EOS = "<pad>", "</s>"
EOS_NAMES = (EOS, "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")


class Tokenizer:
    """Encodes a document as its ids and one end-of-document id.

    Text never becomes a special token: if a document contains ``</s>`` or ``<extra_id_0>`` literally, a space is put
    into that string. T5's hundred sentinels therefore cannot occur, and ``vocab_size`` is 32,000 for t5-base, not
    32,100. This is the size of the embedding in the published configurations.

    Args:
        fast: Tokenizer of the ``tokenizers`` library.
        eos_id: Id that ends each document.
        pad_id: Id of padding; None if the tokenizer has none.
        name: Folder, file or repository that the tokenizer came from, for messages.

    Attributes:
        vocab_size: 1 + the largest id that a document can have, or padding.
    """

    def __init__(self, fast: FastTokenizer, eos_id: int, pad_id: int | None, name: str) -> None:
        fast.no_padding()
        fast.no_truncation()
        self.fast, self.eos_id, self.pad_id, self.name = fast, eos_id, pad_id, name
        self._fingerprint: str | None = None
        special = {i: token.content for i, token in fast.get_added_tokens_decoder().items() if token.special}
        self.unknown_id = _unknown_id(fast)  # the one special token that text may become
        named = {i for i in (eos_id, pad_id, self.unknown_id) if i is not None}
        self.vocab_size = 1 + max(set(fast.get_vocab().values()) - set(special) | named)
        self._never_in_text = frozenset(special) - {self.unknown_id}
        self._special = re.compile("|".join(map(re.escape, special.values())) or r"(?!)")

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encode each text as its ids, ended by ``eos_id``.

        Raises:
            InputError: If a text is not valid Unicode, or becomes a special token in spite of the spaces.
        """
        texts = [self._broken_up(text) for text in texts]
        try:
            # encode_batch_fast computes no offsets into the text, which are not needed here. In a document of
            # megabytes they take as long as the ids, because the library looks up the character of each byte.
            encodings = self.fast.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError as error:  # the library raises it for half of a surrogate pair
            raise InputError(f"a text is not valid Unicode: {_invalid(texts)}; repair it") from error
        return [
            [*(item.ids if self._never_in_text.isdisjoint(item.ids) else self._encode_normalized(text)), self.eos_id]
            for text, item in zip(texts, encodings, strict=True)
        ]

    def _broken_up(self, text: str) -> str:
        """Put a space into each special token that the text contains."""
        return self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def _encode_normalized(self, text: str) -> list[int]:
        """Encode a text that contains a special token only after normalization, for example full-width ``＜/s＞``."""
        text = self._broken_up(self.fast.normalizer.normalize_str(text) if self.fast.normalizer else text)
        ids = self.fast.encode(text, add_special_tokens=False).ids
        if found := self._never_in_text.intersection(ids):
            raise InputError(
                f"tokenizer {self.name} makes its special token {self.fast.id_to_token(min(found))!r} out of text; "
                f"choose another tokenizer, or take that token out of the text"
            )
        return list(ids)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which generation ends."""
        return frozenset({self.eos_id})

    @property
    def prefix(self) -> list[int]:
        """Ids that precede each text: none, as in training."""
        return []

    def decode(self, ids: list[int]) -> str:
        """Turn ids into text, without special tokens."""
        return str(self.fast.decode(ids, skip_special_tokens=True))

    def check_fits(self, vocab_size: int) -> None:
        """Check that a network's embedding has a row for each id of this tokenizer.

        Args:
            vocab_size: Rows of the embedding (V).

        Raises:
            InputError: If it has fewer.
        """
        if self.vocab_size > vocab_size:
            raise InputError(
                f"tokenizer {self.name} has {self.vocab_size} ids, but the network only {vocab_size}; name the "
                f"tokenizer that it was trained with by --tokenizer"
            )

    def fingerprint(self) -> str:
        """Compute a hash that is equal for tokenizers that give the same ids for every text.

        Settings that are off are left out, so that the hash stays the same when a release of the library adds one.
        """
        if self._fingerprint is None:
            content = json.dumps([_without_defaults(json.loads(self.fast.to_str())), self.eos_id], sort_keys=True)
            self._fingerprint = hashlib.sha256(content.encode()).hexdigest()
        return self._fingerprint

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` in Hugging Face's format."""
        folder.mkdir(parents=True, exist_ok=True)
        self.fast.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.fast.id_to_token(self.eos_id)}
        if self.pad_id is not None:
            settings["pad_token"] = self.fast.id_to_token(self.pad_id)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))

    @classmethod
    def load(cls, name: str, retry: Retry | None = None) -> Self:
        """Load a tokenizer.

        The end-of-document token is the one that the settings files beside ``tokenizer.json`` name, else the one that
        the model's config.json names, else the first of ``EOS_NAMES`` that is in the vocabulary.

        Args:
            name: Folder with a ``tokenizer.json``, such a file, or repository on the hub.
            retry: Retries downloads that fail; ``Retry()`` if not given.

        Raises:
            InputError: If there is no tokenizer, or its end-of-document token is not named or not in its vocabulary.
        """
        find = find_tokenizer_files(name, retry or Retry())
        file = find("tokenizer.json")
        assert file is not None  # else find_tokenizer_files would have raised
        check_file_size(file)
        try:
            fast = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file} is not a tokenizer.json of the tokenizers library: {error}") from error
        settings = read_settings(find)
        eos_id, pad_id = (_named_id(fast, settings, key, name) for key in ("eos_token", "pad_token"))
        if eos_id is None:
            config = read_object(find("config.json"))
            eos_id = _configured_id(fast, config, "eos_token_id", name)
            if pad_id is None and eos_id is not None:
                pad_id = _configured_id(fast, config, "pad_token_id", name)
        if eos_id is None:
            eos_id = next((i for i in map(fast.token_to_id, EOS_NAMES) if i is not None), None)
        if eos_id is None:
            raise InputError(f"tokenizer {name} names no eos_token; add it to the tokenizer_config.json beside {file}")
        return cls(fast, eos_id, fast.token_to_id(PAD) if pad_id is None else pad_id, name)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Train a byte-level BPE, which can encode any text. Id 0 is padding, and id 1 ends a document.

        Args:
            texts: Documents to train on.
            vocab_size: Number of ids (V), special tokens included.

        Raises:
            InputError: If ``vocab_size`` is too small for the 256 bytes and the two special tokens.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + 2:
            raise InputError(
                f"vocab_size {vocab_size} is too small for a byte-level BPE; choose {len(alphabet) + 2} or more"
            )
        fast = FastTokenizer(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
        )
        fast.train_from_iterator(texts, trainer)
        return cls(fast, eos_id=1, pad_id=0, name=f"byte-level BPE of {vocab_size} trained on the corpus")


def _named_id(fast: FastTokenizer, settings: dict[str, Any], key: str, name: str) -> int | None:
    """Look up the id of a special token that the settings name; None if they name none."""
    token = token_content(settings, key)
    if token is None:
        return None
    found = fast.token_to_id(token)
    if found is None:
        raise InputError(
            f"tokenizer {name} names {key} {token!r}, which is not in its vocabulary; correct it in its "
            f"tokenizer_config.json or special_tokens_map.json"
        )
    return int(found)


def _configured_id(fast: FastTokenizer, config: dict[str, Any], key: str, name: str) -> int | None:
    """Look up an id in a model's config.json, the first of several; None if there is none."""
    value = config.get(key)
    value = value[0] if isinstance(value, list) and value else value
    if value is None:
        return None
    if not isinstance(value, int) or fast.id_to_token(value) is None:
        raise InputError(
            f"the config.json of tokenizer {name} has {key} {value!r}, which is not in its vocabulary; name the token "
            f"in a tokenizer_config.json"
        )
    return value


def _unknown_id(fast: FastTokenizer) -> int | None:
    """Return the id of text that the tokenizer cannot encode; None if it can encode any text."""
    model = fast.model
    if isinstance(model, models.Unigram):
        unknown = json.loads(fast.to_str())["model"]["unk_id"]
        return None if unknown is None else int(unknown)
    token = getattr(model, "unk_token", None)
    return None if token is None else fast.token_to_id(token)


def _without_defaults(content: Any) -> Any:
    """Leave out settings that are None or False, at any depth."""
    if isinstance(content, dict):
        return {key: _without_defaults(value) for key, value in content.items() if value not in (None, False)}
    if isinstance(content, list) and content and isinstance(content[0], dict):  # not a vocabulary, which is long
        return [_without_defaults(value) for value in content]
    return content


def _invalid(texts: list[str]) -> str:
    """Describe the first character that is not valid Unicode."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"{text[error.start]!r} after {text[max(0, error.start - 20) : error.start]!r}"
    return "it is not text"
