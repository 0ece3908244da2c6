"""Text files tokenized once, and kept in a cache folder with a name made from all that the content depends on."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import TypedDict

from cola_lightning.data.cache import is_whole, new_folder
from cola_lightning.data.documents import find_files, read_documents
from cola_lightning.data.fingerprints import describe_content, fingerprint_files
from cola_lightning.data.packing import Documents
from cola_lightning.data.retry import Retry
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from cola_lightning.stored_data import read_json

if TYPE_CHECKING:  # imported where it is used, because that takes a second
    from datasets import Dataset

CACHE_FORMAT = 3
DIGESTS = "ids.json"
"""File in a cache folder: a digest of the ids of each part."""


class _Digests(TypedDict):
    train: str
    validation: str


class TokenizedText(NamedTuple):
    """Content of a cache folder: the tokenizer, a digest of the ids of each part, and the parts."""

    tokenizer: Tokenizer
    digests: dict[str, str]
    train: Documents
    validation: Documents


@dataclass
class TextFiles:
    """Text files, how documents are read from them, and how they are split; the cache depends on all of it.

    Args:
        paths: Files, folders or patterns; see :func:`find_files`.
        validation_paths: Held-out text; if not given, ``validation_fraction`` of the documents is held out.
        validation_fraction: Share of the documents, at least one, that is held out.
        text_column: Key or column of the text in .jsonl and .parquet files.
        separator: String between the documents of a .txt file.
        seed: Decides which documents are held out.
        cache_dir: Folder that holds the cache folders.
    """

    paths: list[str]
    validation_paths: list[str] | None
    validation_fraction: float
    text_column: str
    separator: str | None
    seed: int
    cache_dir: Path

    def cache_folder(self, tokenizer: Tokenizer | None, vocab_size: int, named: bool) -> Path:
        """Return the cache folder of these files, as they are now, for a tokenizer; it may not exist yet.

        Args:
            tokenizer: Tokenizer of the text; None if one is trained on it.
            vocab_size: Size of the tokenizer that is trained.
            named: Whether the user named the tokenizer. Otherwise it may have been trained on this very text, which is
                then in the folder for a trained one.
        """
        stated = (self.paths, self.validation_paths)
        parts = [[str(file) for file in find_files(paths)] if paths else [] for paths in stated]
        content = {
            "format": CACHE_FORMAT,
            "files": [describe_content(files, fingerprint_files(files, Retry())) for files in parts],
            "split": None if self.validation_paths else [self.validation_fraction, self.seed],
            "text": [self.text_column, self.separator],
        }

        def folder(key: str | int) -> Path:
            text = json.dumps(content | {"tokenizer": key})
            return self.cache_dir / hashlib.sha256(text.encode()).hexdigest()[:16]

        trained = folder(vocab_size)
        if tokenizer is None:
            return trained
        fingerprint = tokenizer.fingerprint()
        kept = load(trained).tokenizer if not named and is_whole(trained, lambda: load(trained)) else None
        return trained if kept and kept.fingerprint() == fingerprint else folder(fingerprint)

    def tokenize(self, folder: Path, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        """Read, split and tokenize the documents into a cache folder.

        Args:
            folder: The folder, which appears when it is complete.
            tokenizer: Tokenizer to use; None to train one on the training documents.
            vocab_size: Size of the tokenizer that is trained.

        Raises:
            InputError: If the text cannot be read, or no document is left to train or to validate on.
        """
        from datasets import Features, List, Value

        with new_folder(folder) as (content, temporary):
            train, validation = self._split(temporary)
            rank_zero_info(f"Tokenizing {len(train) + len(validation):,} documents of {', '.join(self.paths)}")
            encoder = tokenizer or Tokenizer.train(_texts_of(train), vocab_size)
            encoder.save(content / "tokenizer")
            digests: dict[str, str] = {}
            for name, documents in (("train", train), ("validation", validation)):
                tokens = documents.map(
                    lambda batch: {"ids": encoder.encode(batch["text"])},
                    batched=True,
                    remove_columns=["text"],
                    features=Features({"ids": List(Value("int32"))}),
                    desc=f"Tokenizing {name} documents",
                    cache_file_name=str(temporary / f"{name}.arrow"),
                )
                tokens.save_to_disk(content / name)
                digests[name] = _digest(Documents(tokens.data.column("ids")))
            (content / DIGESTS).write_text(json.dumps(digests), encoding="utf-8")

    def _split(self, temporary: Path) -> "tuple[Dataset, Dataset]":
        documents = self._read(self.paths, temporary)
        if self.validation_paths:
            return _without_copies(documents, self._read(self.validation_paths, temporary))
        if len(documents) < 2:
            raise InputError(
                f"{', '.join(self.paths)} holds a single document, so none can be held out; name "
                f"--data.validation_paths, or the --data.separator that divides a .txt file into documents"
            )
        held_out = min(len(documents) - 1, max(1, round(self.validation_fraction * len(documents))))
        parts = documents.train_test_split(test_size=held_out, seed=self.seed)
        return _without_copies(parts["train"], parts["test"])

    def _read(self, paths: list[str], temporary: Path) -> "Dataset":
        from datasets import Dataset

        # A tuple, because the library calls the generator once per entry of a list, and would read a file twice that
        # two entries name.
        files = tuple(map(str, find_files(paths)))
        arguments: dict[str, Any] = {"files": files, "text_column": self.text_column, "separator": self.separator}
        # Read one document first, because the library would wrap an error of the generator in one of its own.
        if next(_documents(**arguments), None) is None:
            raise InputError(f"{', '.join(paths)} holds no text; every document is empty")
        try:
            return Dataset.from_generator(_documents, gen_kwargs=arguments, cache_dir=str(temporary))
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, InputError):
                cause = cause.__cause__
            raise cause or error from None


def load(folder: Path) -> TokenizedText:
    """Load a cache folder; the ids stay on disk."""
    from datasets import load_from_disk

    digests = read_json(folder / DIGESTS, "delete it", _Digests)
    train, validation = (
        Documents(load_from_disk(folder / name).data.column("ids")) for name in ("train", "validation")
    )
    return TokenizedText(Tokenizer.load(str(folder / "tokenizer")), digests, train, validation)


def _without_copies(train: "Dataset", validation: "Dataset") -> "tuple[Dataset, Dataset]":
    """Leave out of training each document that equals a validation document, and say how many."""
    held_out = set(map(_text_digest, _texts_of(validation)))
    kept = [index for index, text in enumerate(_texts_of(train)) if _text_digest(text) not in held_out]
    if not kept:
        raise InputError("every training document is held out for validation; name other --data.validation_paths")
    if left_out := len(train) - len(kept):
        rank_zero_warn(
            f"{left_out:,} of {len(train):,} training documents equal a validation document; they are not trained on"
        )
        train = train.select(kept)
    return train, validation


def _texts_of(documents: "Dataset") -> Iterable[str]:
    return (text for batch in documents.iter(1000) for text in batch["text"])


def _documents(files: tuple[str, ...], text_column: str, separator: str | None) -> Iterator[dict[str, str]]:
    for text in read_documents(list(map(Path, files)), text_column, separator):
        yield {"text": text}


def _digest(documents: Documents) -> str:
    found = hashlib.sha256(documents.offsets.tobytes())
    found.update(documents.ids.tobytes())
    return found.hexdigest()[:32]


def _text_digest(text: str) -> bytes:
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()
