"""Tokenizer of a model that was trained elsewhere, with the ids that transformers gives."""

import json
import shutil
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, normalizers, pre_tokenizers

from cola_lightning.data.retry import Retry
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.data.tokenizer_files import FindFile, find_tokenizer_files, read_object, read_settings
from cola_lightning.errors import InputError

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
"""Files of a tokenizer and of generation; a model may have some of them."""


class FolderTokenizer(Tokenizer):
    """Encodes a text with the ids that the template in tokenizer.json puts before it.

    Special tokens in the text become their ids, so that a prompt can contain them. A document still ends with the
    end-of-document id.

    Args:
        fast: Tokenizer of the ``tokenizers`` library.
        eos_id: Id that ends each document.
        pad_id: Id of padding; None if the tokenizer has none.
        name: Folder, file or repository that the tokenizer came from, for messages.

    Attributes:
        ids: ``bos_token_id`` and ``eos_token_id``, from the model's config.json where it has them.
    """

    find: FindFile

    def __init__(self, fast: FastTokenizer, eos_id: int, pad_id: int | None, name: str) -> None:
        super().__init__(fast, eos_id, pad_id, name)
        special = {i for i, token in fast.get_added_tokens_decoder().items() if token.special}
        named = {i for i in (eos_id, self.unknown_id) if i is not None}
        self.vocab_size = 1 + max(set(fast.get_vocab().values()) - special | named)
        self._rows: int | None = None
        self._stop_ids = frozenset({eos_id})
        self.ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": eos_id}

    @classmethod
    def open(cls, name: str) -> Self:
        """Load a tokenizer with all the settings beside it.

        Args:
            name: Folder, tokenizer.json, or repository on the hub.

        Raises:
            InputError: If there is no tokenizer, or a settings file is not a JSON object.
        """
        tokenizer = cls.load(name)
        tokenizer.find = find_tokenizer_files(name, Retry())
        tokenizer._cut_as_llama(read_settings(tokenizer.find))
        config, generation = (read_object(tokenizer.find(file)) for file in ("config.json", "generation_config.json"))
        tokenizer.ids |= {key: config[key] for key in tokenizer.ids if config.get(key) is not None}
        stops = generation.get("eos_token_id", config.get("eos_token_id"))
        stops = stops if isinstance(stops, list) else [stops]
        if known := frozenset(stop for stop in stops if isinstance(stop, int) and not isinstance(stop, bool)):
            tokenizer._stop_ids = known
        return tokenizer

    def _cut_as_llama(self, settings: dict[str, Any]) -> None:
        """Replace the normalizer of a ``LlamaTokenizer`` (LLaMA 1 and 2) as transformers 5 does.

        Then no space is added before a text that begins with a space, or before text after a special token.
        """
        if settings.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
            return
        normalizer = json.loads(self.fast.to_str())["normalizer"] or {}
        if not any(step.get("type") == "Prepend" for step in normalizer.get("normalizers") or []):
            return
        prefixed = settings.get("add_prefix_space") in (None, True)
        scheme = "never" if not prefixed else "always" if settings.get("legacy") else "first"
        # An empty sequence, because the library does not accept None here.
        self.fast.normalizer = normalizers.Sequence([])
        self.fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        strip = [decoders.Strip(content=" ", left=1, right=0)] if prefixed else []
        self.fast.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )

    @property
    def stop_ids(self) -> frozenset[int]:
        return self._stop_ids

    @property
    def prefix(self) -> list[int]:
        """Ids that the template puts before each text."""
        encoding = self.fast.encode("a", add_special_tokens=True)
        inside = [index for index, part in enumerate(encoding.sequence_ids) if part is not None]
        return list(encoding.ids[: inside[0]]) if inside else []

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encode each text as the ids that transformers gives, ended by ``eos_id``.

        Raises:
            InputError: If a text is not valid Unicode, or has an id that the network lacks.
        """
        try:
            encodings = self.fast.encode_batch_fast(texts, add_special_tokens=True)
        except TypeError as error:  # the library raises it for half of a surrogate pair
            raise InputError("a text is not valid Unicode; repair it") from error
        rows, before = [], len(self.prefix)
        for item in encodings:
            end = len(item.ids)
            while end > before and item.sequence_ids[end - 1] is None:
                end -= 1  # the template's id after a text, which the end-of-document id replaces
            rows.append([*item.ids[:end], self.eos_id])
            if self._rows is not None and (beyond := [i for i in rows[-1] if i >= self._rows]):
                raise InputError(
                    f"tokenizer {self.name} makes id {beyond[0]} of {self.fast.id_to_token(beyond[0])!r}, but the "
                    f"network has only {self._rows}; take that token out of the text"
                )
        return rows

    def check_fits(self, vocab_size: int) -> None:
        super().check_fits(vocab_size)
        self._rows = vocab_size

    def copy_files(self, folder: Path) -> None:
        """Copy the tokenizer's files and the generation settings unchanged."""
        for name in FILES:
            if (file := self.find(name)) is not None:
                shutil.copyfile(file, folder / name)
