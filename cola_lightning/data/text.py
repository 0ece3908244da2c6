"""The data module for text that lies on this machine."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from datasets import Dataset, Features, List, Value, load_from_disk
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset as Rows
from typing_extensions import TypedDict

from cola_lightning.data.cache import cache_folder, is_whole
from cola_lightning.data.documents import find_files, find_left_out, read_documents
from cola_lightning.data.identity import Identity, describe_files, fingerprint_files
from cola_lightning.data.inventory import describe
from cola_lightning.data.retry import Retry
from cola_lightning.data.row_loader import TrainLoader
from cola_lightning.data.rows import Documents, PackedRows, PaddedRows
from cola_lightning.data.token_data_module import IDENTITY, StoredState, TokenDataModule, resolve_global_batch_size
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from cola_lightning.host_memory import check_batch, check_memory, check_workers
from cola_lightning.stored_data import Count, check_stored

CACHE_FORMAT = 3
IDS = "ids.json"
"""File in a cached corpus: a digest of the ids of each part."""


class _Digests(TypedDict):
    train: str
    validation: str


class _State(StoredState):
    position: Count


class TextDataModule(TokenDataModule):
    """Trains on .txt, .jsonl and .parquet files, tokenized once and cached.

    Args:
        paths: Files, folders, patterns, or ``package:NAME/FOLDER`` for text that an installed Python package brings.
        tokenizer: Folder with a tokenizer.json, such a file, or a repository on the Hugging Face hub. If none is named,
            a byte-level BPE is trained on the training documents.
        vocab_size: Size of the BPE that is trained where no tokenizer is named.
        sequence_length: Tokens of a row (T).
        batch_size: Rows of a micro-batch on one device (B).
        global_batch_size: Rows of an optimizer step over all devices; gradients are accumulated to it. If none is
            given, it is what the trainer's ``accumulate_grad_batches`` makes of ``batch_size``.
        global_batch_tokens: The same in tokens, in place of it: rows times ``sequence_length``.
        rows: ``packed`` puts documents end to end; ``padded`` makes one document a row, cut and padded, as the paper's
            benchmark does. Padding is never in the loss.
        validation_paths: Held-out text, as ``paths``. If none is named, ``validation_fraction`` of the documents is
            held out.
        validation_fraction: Share of the documents, at least one, that is held out, chosen by ``seed``.
        text_column: Key or column of the text in .jsonl and .parquet files.
        separator: String between the documents of a .txt file; without it each file is one document.
        seed: Decides the split and the order of the rows.
        num_workers: Processes that read ahead.
        cache_dir: Where tokenized text is kept; by default cola_lightning in $XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        InputError: If ``sequence_length`` is below 2 or ``batch_size`` below 1.
    """

    _state_type = _State

    def __init__(
        self,
        paths: list[str],
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        sequence_length: int = 256,
        batch_size: int = 16,
        global_batch_size: int | None = None,
        global_batch_tokens: int | None = None,
        rows: Literal["packed", "padded"] = "packed",
        validation_paths: list[str] | None = None,
        validation_fraction: float = 0.05,
        text_column: str = "text",
        separator: str | None = None,
        seed: int = 42,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if sequence_length < 2:
            raise InputError(f"sequence_length is {sequence_length}; a row needs at least 2 tokens")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        check_batch(batch_size, sequence_length)
        check_workers(num_workers)
        # The trainer makes room for all of it at once, in a table of texts.
        check_memory(vocab_size * 64, f"a tokenizer of --data.vocab_size {vocab_size}", "choose a smaller one")
        if not 0 < validation_fraction < 1:
            raise InputError(f"validation_fraction is {validation_fraction}; it must lie between 0 and 1")
        if not 0 <= seed < 2**32:
            raise InputError(f"--data.seed is {seed}; it must lie between 0 and {2**32 - 1}")
        self.paths, self.validation_paths, self.validation_fraction = paths, validation_paths, validation_fraction
        self.tokenizer_name, self.vocab_size = tokenizer, vocab_size
        self.text_column, self.separator = text_column, separator
        self.sequence_length, self.row_type = sequence_length, rows
        self.batch_size = batch_size
        self.global_batch_size = resolve_global_batch_size(global_batch_size, global_batch_tokens, sequence_length)
        self.seed, self.num_workers = seed, num_workers
        self.cache_dir = cache_folder(cache_dir)
        self._train_loader: TrainLoader | None = None
        self._position = 0

    # -- text to tokens, once -----------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Read, split and tokenize, unless the cache holds the result; one process of a node does it."""
        folder = self._cache()
        self._say_what_was_found()
        if is_whole(folder, lambda: self._load(folder)):
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(mkdtemp(dir=folder.parent, prefix=".making-"))
        try:
            train, validation = self._split(scratch)
            tokenizer = self._make_tokenizer(train)
            tokenizer.save(scratch / "result" / "tokenizer")
            ids: dict[str, str] = {}
            for name, documents in (("train", train), ("validation", validation)):
                tokens = documents.map(
                    lambda batch: {"ids": tokenizer.encode(batch["text"])},
                    batched=True,
                    remove_columns=["text"],
                    features=Features({"ids": List(Value("int32"))}),
                    desc=f"Tokenizing {name} documents",
                    cache_file_name=str(scratch / f"{name}.arrow"),
                )
                tokens.save_to_disk(scratch / "result" / name)
                ids[name] = _digest(Documents(tokens.data.column("ids")))
            (scratch / "result" / IDS).write_text(json.dumps(ids), encoding="utf-8")
            try:
                (scratch / "result").rename(folder)
            except OSError:
                if not folder.exists():  # else another run was quicker, with the same content
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def setup(self, stage: str) -> None:
        self._stage = stage
        folder = self._cache()
        if stage == "fit":
            self._train_loader = None  # a fit of its own begins where it is told to
        tokenizer, self._ids, train, validation = self._load(folder)
        self.tokenizer = self._known_tokenizer() or tokenizer
        self._compare()
        for kind, documents in (("train on", train), ("validate on", validation)):
            rank_zero_info(f"{kind} {documents.summary()}")
        self.train_rows, self.validation_rows = self._rows(train), self._rows(validation)

    def _load(self, folder: Path) -> tuple[Tokenizer, dict[str, str], Documents, Documents]:
        """All that a cached folder holds."""
        ids = json.loads((folder / IDS).read_text(encoding="utf-8"))
        check_stored(ids, _Digests, folder / IDS, "delete it")
        parts = (Documents(load_from_disk(folder / name).data.column("ids")) for name in ("train", "validation"))
        return Tokenizer.load(str(folder / "tokenizer")), ids, *parts

    def _cache(self) -> Path:
        """Folder whose name tells everything that its content depends on."""
        files = [str(file) for paths in (self.paths, self.validation_paths) if paths for file in find_files(paths)]
        content = {
            "format": CACHE_FORMAT,
            # Times too, because of large files only samples are looked at.
            "files": [files, fingerprint_files(files, Retry()), [Path(file).stat().st_mtime_ns for file in files]],
            "split": [self.paths, self.validation_paths, self.validation_fraction, self.seed],
            "text": [self.text_column, self.separator],
        }

        def folder(tokenizer: str | int) -> Path:
            key = json.dumps(content | {"tokenizer": tokenizer})
            return self.cache_dir / hashlib.sha256(key.encode()).hexdigest()[:16]

        tokenizer = self._known_tokenizer()
        if tokenizer is None:
            return folder(self.vocab_size)
        if self.tokenizer_name is None:  # the run's own, which may have been trained on this very text
            trained = folder(self.vocab_size)
            whole = is_whole(trained, lambda: self._load(trained))
            if whole and Tokenizer.load(str(trained / "tokenizer")).fingerprint() == tokenizer.fingerprint():
                return trained
        return folder(tokenizer.fingerprint())

    def _known_tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the run, or the one that is named; None where one is to be trained on the text."""
        name = self.tokenizer_name
        return self._choose_tokenizer((lambda: Tokenizer.load(name)) if name else None)

    def _split(self, scratch: Path) -> tuple[Dataset, Dataset]:
        documents = self._documents(self.paths, scratch)
        if self.validation_paths:
            return self._without_copies(documents, self._documents(self.validation_paths, scratch))
        if len(documents) < 2:
            raise InputError(
                f"{', '.join(self.paths)} holds a single document, so none can be held out; name "
                f"--data.validation_paths, or the --data.separator that divides a .txt file into documents"
            )
        held_out = min(len(documents) - 1, max(1, round(self.validation_fraction * len(documents))))
        parts = documents.train_test_split(test_size=held_out, seed=self.seed)
        return self._without_copies(parts["train"], parts["test"])

    def _without_copies(self, train: Dataset, validation: Dataset) -> tuple[Dataset, Dataset]:
        """Leave out of training each document that equals one of the validation documents, and say how many."""
        held_out = set(map(_text_digest, (text for batch in validation.iter(1000) for text in batch["text"])))
        texts = (text for batch in train.iter(1000) for text in batch["text"])
        kept = [index for index, text in enumerate(texts) if _text_digest(text) not in held_out]
        if not kept:
            raise InputError("every training document is held out for validation; name other --data.validation_paths")
        if left_out := len(train) - len(kept):
            rank_zero_warn(
                f"{left_out:,} of {len(train):,} training documents equal a validation document; they are not trained "
                f"on"
            )
            train = train.select(kept)
        return train, validation

    def _say_what_was_found(self) -> None:
        for kind, paths in (("train on", self.paths), ("validate on", self.validation_paths)):
            if not paths:
                continue
            files = list(map(str, find_files(paths)))
            folders = [path for path in paths if Path(path).expanduser().is_dir()]
            repeated, others = find_left_out(paths)
            for line in describe(", ".join(paths), files, folders, repeated=repeated, left_out=list(map(str, others))):
                rank_zero_info(f"{kind} {line}")

    def _documents(self, paths: list[str], scratch: Path) -> Dataset:
        # A tuple, because the library calls the generator once for each entry of a list, and a file that two entries
        # name would be read twice.
        files = tuple(map(str, find_files(paths)))
        arguments: dict[str, Any] = {"files": files, "text_column": self.text_column, "separator": self.separator}
        # Looked at first, because the library would wrap an error from inside the generator in one of its own.
        if next(_texts(**arguments), None) is None:
            raise InputError(f"{', '.join(paths)} holds no text; every document is empty")
        try:
            return Dataset.from_generator(_texts, gen_kwargs=arguments, cache_dir=str(scratch))
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, InputError):
                cause = cause.__cause__
            raise cause or error from None

    def _make_tokenizer(self, train: Dataset) -> Tokenizer:
        if (tokenizer := self._known_tokenizer()) is not None:
            return tokenizer
        batches = (batch["text"] for batch in train.iter(batch_size=64))
        return Tokenizer.train((text for batch in batches for text in batch), self.vocab_size)

    def _rows(self, documents: Documents) -> Rows:
        kind = PackedRows if self.row_type == "packed" else PaddedRows
        pad_id = self.tokenizer.eos_id if self.tokenizer.pad_id is None else self.tokenizer.pad_id
        return kind(documents, self.sequence_length, pad_id)

    # -- rows to batches ----------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TrainLoader:
        trainer = self.trainer
        assert trainer is not None
        share, overfit = self._share(), trainer.overfit_batches > 0
        check_batch(self.batch_size, self.sequence_length, trainer.accumulate_grad_batches)
        run = trainer.max_steps * trainer.accumulate_grad_batches
        self._train_loader = TrainLoader(
            self.train_rows,
            self.batch_size,
            # To overfit, Lightning takes a share of the data set, not of the run.
            batches=max(1, len(self.train_rows) // (self.batch_size * share["replicas"])) if overfit else run,
            batches_per_step=trainer.accumulate_grad_batches,
            overfit=overfit,
            seed=self.seed,
            # Lightning may ask anew at each epoch, by reload_dataloaders_every_n_epochs; the run goes on all the same.
            position=self._train_loader.position if self._train_loader else self._position,
            workers=self.num_workers,
            **share,
        )
        return self._train_loader

    # -- position -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        position = self._train_loader.position if self._train_loader else self._position
        return {"position": position, IDENTITY: self._known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._position, self._train_loader = state_dict["position"], None

    # -- identity -----------------------------------------------------------------------------------------------------

    def _settings(self) -> Identity:
        return {
            "fixed": {
                "sequence_length": self.sequence_length,
                "rows": self.row_type,
                "seed": self.seed,
                "separator": self.separator,
                "validation_fraction": None if self.validation_paths else self.validation_fraction,
            }
            | ({} if self.tokenizer_name else {"vocab_size": self.vocab_size}),
            "free": {},
            "sources": [self._describe(self.paths)],
            "validation": self._describe(self.validation_paths) if self.validation_paths else None,
        }

    def _describe(self, paths: list[str]) -> Identity:
        files = [str(file) for file in find_files(paths)]
        return describe_files(", ".join(paths), self.text_column, files, fingerprint_files(files, Retry()))

    def _identity(self) -> Identity:
        tokenizer = {"name": self.tokenizer_name, "fingerprint": self.tokenizer.fingerprint()}
        return self._settings() | {"tokenizer": tokenizer, "ids": self._ids["train"]}


def _texts(files: tuple[str, ...], text_column: str, separator: str | None) -> Iterator[dict[str, str]]:
    for text in read_documents(list(map(Path, files)), text_column, separator):
        yield {"text": text}


def _digest(documents: Documents) -> str:
    found = hashlib.sha256(documents.offsets.tobytes())
    found.update(documents.ids.tobytes())
    return found.hexdigest()[:32]


def _text_digest(text: str) -> bytes:
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()
