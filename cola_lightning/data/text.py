"""The data module for text on this machine's disk."""

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from cola_lightning.data.cache import cache_folder, is_whole
from cola_lightning.data.documents import find_files, find_left_out
from cola_lightning.data.fingerprints import fingerprint_files
from cola_lightning.data.identity import Identity, describe_files
from cola_lightning.data.inventory import describe
from cola_lightning.data.packing import Rows
from cola_lightning.data.retry import Retry
from cola_lightning.data.row_loader import TrainLoader
from cola_lightning.data.text_cache import TextFiles, load
from cola_lightning.data.token_data_module import (
    IDENTITY,
    StoredState,
    TokenDataModule,
    check_sizes,
    resolve_global_batch_size,
)
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from cola_lightning.host_memory import check_batch, check_memory
from cola_lightning.stored_data import Count


class _State(StoredState):
    position: Count


class TextDataModule(TokenDataModule):
    """Trains on .txt, .jsonl and .parquet files, which are tokenized once and cached.

    Args:
        paths: Files, folders, patterns, or ``package:NAME/FOLDER`` for text in an installed Python package; one, or a
            list.
        tokenizer: Folder with a tokenizer.json, such a file, or a repository on the Hugging Face hub. If not given, a
            byte-level BPE is trained on the training documents.
        vocab_size: Size of the BPE that is trained if no tokenizer is named.
        sequence_length: Tokens of a row (T).
        batch_size: Rows of a micro-batch on one device (B).
        global_batch_size: Rows of an optimizer step over all devices; gradients are accumulated to reach it. If not
            given, it follows from ``batch_size`` and the trainer's ``accumulate_grad_batches``.
        global_batch_tokens: The same in tokens: rows times ``sequence_length``.
        rows: ``packed`` puts documents end to end; ``padded`` makes one row of each document, cut and padded, as in the
            papers' benchmark. Padding is never in the loss.
        validation_paths: Held-out text, as ``paths``. If not given, ``validation_fraction`` of the documents is held
            out.
        validation_fraction: Share of the documents, at least one, that is held out, chosen by ``seed``.
        text_column: Key or column of the text in .jsonl and .parquet files.
        separator: String between the documents of a .txt file; without it each file is one document.
        seed: Decides the split and the order of the rows.
        num_workers: Processes that read ahead; 0 for none.
        cache_dir: Where tokenized text is kept; by default cola_lightning in $XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        InputError: If ``sequence_length`` is below 2 or ``batch_size`` below 1.
    """

    _state_type = _State

    def __init__(
        self,
        paths: list[str] | str,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        sequence_length: int = 256,
        batch_size: int = 16,
        global_batch_size: int | None = None,
        global_batch_tokens: int | None = None,
        rows: Literal["packed", "padded"] = "packed",
        validation_paths: list[str] | str | None = None,
        validation_fraction: float = 0.05,
        text_column: str = "text",
        separator: str | None = None,
        seed: int = 42,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(sequence_length, batch_size, num_workers)
        # The trainer allocates a table of all texts at once.
        check_memory(vocab_size * 64, f"a tokenizer of --data.vocab_size {vocab_size}", "choose a smaller one")
        if not 0 < validation_fraction < 1:
            raise InputError(f"validation_fraction is {validation_fraction}; it must lie between 0 and 1")
        if not 0 <= seed < 2**32:
            raise InputError(f"--data.seed is {seed}; it must lie between 0 and {2**32 - 1}")
        self.tokenizer_name, self.vocab_size = tokenizer, vocab_size
        self.sequence_length, self.row_type = sequence_length, rows
        self.batch_size = batch_size
        self.global_batch_size = resolve_global_batch_size(global_batch_size, global_batch_tokens, sequence_length)
        self.seed, self.num_workers = seed, num_workers
        self.text = TextFiles(
            _as_list(paths),
            None if validation_paths is None else _as_list(validation_paths),
            validation_fraction,
            text_column,
            separator,
            seed,
            cache_folder(cache_dir),
        )
        self._train_loader: TrainLoader | None = None
        self._position = 0

    # -- text to tokens -----------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Read, split and tokenize, unless the cache holds the result. One process of a node calls this."""
        tokenizer = self._known_tokenizer()
        folder = self.text.cache_folder(tokenizer, self.vocab_size, self.tokenizer_name is not None)
        self._describe_files()
        if not is_whole(folder, lambda: load(folder)):
            self.text.tokenize(folder, tokenizer, self.vocab_size)

    def setup(self, stage: str) -> None:
        self._stage = stage
        if stage == "fit":
            self._train_loader = None  # a new fit begins at the position that it is given
        tokenizer = self._known_tokenizer()
        folder = self.text.cache_folder(tokenizer, self.vocab_size, self.tokenizer_name is not None)
        text = load(folder)
        self.tokenizer, self._digests = tokenizer or text.tokenizer, text.digests
        self._compare()
        for kind, documents in (("train on", text.train), ("validate on", text.validation)):
            rank_zero_info(f"{kind} {documents.summary()}")
        shape = self._row_shape()
        self.train_rows, self.validation_rows = Rows(text.train, shape), Rows(text.validation, shape)

    def _known_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer of the run, or the one that is named; None if one is to be trained on the text."""
        name = self.tokenizer_name
        return self._choose_tokenizer((lambda: Tokenizer.load(name)) if name else None)

    def _describe_files(self) -> None:
        for kind, paths in (("train on", self.text.paths), ("validate on", self.text.validation_paths)):
            if not paths:
                continue
            files = list(map(str, find_files(paths)))
            repeated, others = find_left_out(paths)
            folders = [path for path in paths if Path(path).expanduser().is_dir()]
            for line in describe(", ".join(paths), files, folders, repeated=repeated, left_out=list(map(str, others))):
                rank_zero_info(f"{kind} {line}")

    # -- batches -------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TrainLoader:
        trainer = self.trainer
        assert trainer is not None
        share, overfit = self._share(), self._overfit_batches() > 0
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
            # With reload_dataloaders_every_n_epochs Lightning asks again at each epoch; the run continues all the same.
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
                "separator": self.text.separator,
                "validation_fraction": None if self.text.validation_paths else self.text.validation_fraction,
            }
            | ({} if self.tokenizer_name else {"vocab_size": self.vocab_size}),
            "free": {},
            "sources": [self._describe(self.text.paths)],
            "validation": self._describe(self.text.validation_paths) if self.text.validation_paths else None,
        }

    def _describe(self, paths: list[str]) -> Identity:
        files = [str(file) for file in find_files(paths)]
        return describe_files(", ".join(paths), self.text.text_column, files, fingerprint_files(files, Retry()))

    def _identity(self) -> Identity:
        tokenizer = {"name": self.tokenizer_name, "fingerprint": self.tokenizer.fingerprint()}
        return self._settings() | {"tokenizer": tokenizer, "ids": self._digests["train"]}


def _as_list(paths: list[str] | str) -> list[str]:
    return [paths] if isinstance(paths, str) else paths
