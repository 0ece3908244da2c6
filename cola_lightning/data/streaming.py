"""The data module for text that is too much for one machine: streamed, or tokenized beforehand."""

import os
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cola_lightning.data.cache import cache_folder
from cola_lightning.data.held_out import HeldOut
from cola_lightning.data.identity import Identity
from cola_lightning.data.logical_shards import MakeLogicalShards
from cola_lightning.data.packing import Rows
from cola_lightning.data.rank_exchange import AllRanks, OneRank
from cola_lightning.data.retry import Retry
from cola_lightning.data.row_beginnings import RowBeginnings, is_safe_to_cut
from cola_lightning.data.run_sources import RunSources
from cola_lightning.data.source_lookup import Corpus
from cola_lightning.data.sources import DataFiles, Source, TextCorpus
from cola_lightning.data.stream_loader import LoaderState, StreamError, StreamLoader
from cola_lightning.data.token_data_module import (
    IDENTITY,
    StoredState,
    TokenDataModule,
    check_sizes,
    resolve_global_batch_size,
)
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.data.validation import ValidationSet
from cola_lightning.errors import InputError, check_at_least
from cola_lightning.host_memory import check_batch, check_memory


class _State(StoredState, LoaderState):
    pass


class StreamingDataModule(TokenDataModule):
    """Trains on a stream of documents, and resumes at the very next token.

    The order of the batches depends on the arguments alone. A checkpoint holds the state of every logical shard (see
    :class:`StreamLoader`) after the batch trained on last. Resuming costs the reading of one shuffle block per logical
    shard, and in a compressed shard the decompression of what comes before that block; nothing that was trained on is
    tokenized again. With another number of ranks or workers no document is lost or repeated. Where ranks x workers
    divides ``num_logical_shards``, before and after, the batches are the same sequence.

    Args:
        path: Data set on the Hugging Face hub, folder of files, format of ``datasets`` with ``data_files``, or folder
            that ``prepare`` made.
        name: Configuration of the data set.
        revision: Branch, tag or commit on the hub. A run stays at the commit that it began with.
        data_files: Files, patterns or addresses, by split.
        text_column: Column of the text.
        sources: Several sources, mixed by their tokens, in place of the one above.
        validation: Source of the validation documents; if not given, split ``validation`` of ``path``, or of the first
            of ``sources``. If it is a split that is trained on too, one document of 20 is held out, by a hash of its
            place. No document that equals a validation document is trained on.
        tokenizer: Folder, tokenizer.json or repository on the hub; if not given, the tokenizer of the first prepared
            source, or t5-base.
        sequence_length: Tokens of a row (T).
        batch_size: Rows of a micro-batch on one device (B).
        global_batch_size: Rows of an optimizer step over all devices; gradients are accumulated to reach it. If not
            given, it follows from ``batch_size`` and the trainer's ``accumulate_grad_batches``.
        global_batch_tokens: The same in tokens: rows times ``sequence_length``.
        rows: ``padded`` makes one row of each document, cut and padded, as in the papers' benchmark; ``packed`` puts
            documents end to end.
        mask_documents: Keep attention in packed rows within a document.
        shuffle_buffer: Documents of a logical shard that are shuffled together; they are read before its first batch.
        num_logical_shards: Parts that the data of the run is divided into. Ranks x workers must not be more. It cannot
            change within a run.
        validation_tokens: Tokens of the validation set, which is the first documents of its source.
        seed: Decides the order of shards and documents.
        num_workers: Processes per rank that read and tokenize ahead; 0 for none.
        retries: Failures in a row that are retried when a shard is read.
        retry_wait: Seconds before the first retry; each further wait is twice as long.
        verify: Compare prepared shards with their checksums before training.
        cache_dir: Where the tokenized validation set is kept; by default as for :class:`TextDataModule`.

    Raises:
        InputError: For values that cannot work.
    """

    _state_type = _State
    _shares_state_with = ("StreamingDataModule", "C4DataModule")

    def __init__(
        self,
        path: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        data_files: DataFiles = None,
        text_column: str = "text",
        sources: list[Source] | None = None,
        validation: Source | None = None,
        tokenizer: str | None = None,
        sequence_length: int = 256,
        batch_size: int = 16,
        global_batch_size: int | None = None,
        global_batch_tokens: int | None = None,
        rows: Literal["padded", "packed"] = "padded",
        mask_documents: bool = False,
        shuffle_buffer: int = 1000,
        num_logical_shards: int = 16,
        validation_tokens: int = 10_000_000,
        seed: int = 42,
        num_workers: int = 1,
        retries: int = 6,
        retry_wait: float = 2.0,
        verify: bool = True,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if not sources and path is None:
            raise InputError("no text is named; set --data.path, or --data.sources for several")
        self.tokenizer_name, self.sequence_length = tokenizer, sequence_length
        self.batch_size = batch_size
        self.global_batch_size = resolve_global_batch_size(global_batch_size, global_batch_tokens, sequence_length)
        self.row_type, self.mask_documents = rows, mask_documents
        self.shuffle_buffer, self.num_logical_shards = shuffle_buffer, num_logical_shards
        self.validation_tokens = validation_tokens
        self.seed, self.num_workers, self.verify = seed, num_workers, verify
        self._check_arguments()
        self.retry, self.cache_dir = Retry(retries, retry_wait), cache_folder(cache_dir)
        alone = [Source(path, name, revision, "train", data_files, text_column)] if path is not None else []
        self.sources = RunSources(sources or alone, validation, self.retry)
        self._loader: StreamLoader | None = None
        self._state: dict[str, Any] | None = None

    def _check_arguments(self) -> None:
        check_sizes(self.sequence_length, self.batch_size, self.num_workers)
        check_at_least(1, "--data.", num_logical_shards=self.num_logical_shards)
        # A checkpoint holds the state of each logical shard, and memory holds its readers.
        check_memory(
            self.num_logical_shards * 2**13,
            f"--data.num_logical_shards {self.num_logical_shards}",
            "take a small multiple of ranks x workers",
        )
        if self.mask_documents and self.row_type == "padded":
            raise InputError("mask_documents is for packed rows; a padded row holds one document")

    # -- sources ------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Check the files of prepared sources, and tokenize the validation set unless the cache holds it. One process
        of a node calls this."""
        if self.verify:
            self.sources.verify()
        tokenizer = self._load_tokenizer()
        self._validation_set(self.sources.open_validation(tokenizer), tokenizer).make()

    def setup(self, stage: str) -> None:
        self._stage, training = stage, stage == "fit"
        # 1. Find the files and the tokenizer.
        self.sources.look_up(self._load_tokenizer, training)
        self.tokenizer = self._load_tokenizer()
        self.row_shape = self._row_shape()
        if training:
            self._loader = None  # a new fit begins at the position that it is given
        self.sources.open(self.tokenizer, training)
        assert self.sources.validation_corpus is not None
        validation = self._validation_set(self.sources.validation_corpus, self.tokenizer)
        # 2. Compare the data with what the run began with, before anything is read from it.
        self._compare()
        # 3. Say what was found, also what was left out, so that a file that is missing is noticed at the start.
        for line in self.sources.describe(self.num_logical_shards):
            rank_zero_info(line)
        # 4. Load the validation set, which ``prepare_data`` made. Training needs it too, to leave out copies of it.
        self._validation_documents = validation.load()
        rank_zero_info(f"validate on {self._validation_documents.summary()} of {validation.corpus.title}")
        self.validation_rows = Rows(self._validation_documents, self.row_shape)

    def _load_tokenizer(self) -> Tokenizer:
        tokenizer = self._choose_tokenizer(lambda: self.sources.load_tokenizer(self.tokenizer_name))
        assert tokenizer is not None
        return tokenizer

    def _validation_set(self, corpus: Corpus, tokenizer: Tokenizer) -> ValidationSet:
        longest = self.sequence_length if self.row_type == "padded" else None
        shared = self.sources.is_validation_shared
        return ValidationSet(corpus, tokenizer, self.validation_tokens, longest, self.cache_dir, shared)

    # -- batches ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> StreamLoader:
        trainer = self.trainer
        assert trainer is not None
        overfit_batches = self._overfit_batches()
        if isinstance(overfit_batches, float) and overfit_batches > 0:
            raise InputError(
                f"--trainer.overfit_batches {overfit_batches} is a share of the data, but a stream has no "
                "length; state a number of batches"
            )
        check_batch(self.batch_size, self.sequence_length, trainer.accumulate_grad_batches)
        share = self._share()
        if self.num_workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads do not outlive the fork of a worker
        held_out = HeldOut(self._validation_documents)
        # A padded row holds only the beginning of a long document, so only that is tokenized, where this is safe.
        corpora: list[Any] = list(self.sources.corpora)
        if self.row_type == "padded" and is_safe_to_cut(self.tokenizer):
            corpora = [
                RowBeginnings(corpus, self.sequence_length, held_out) if isinstance(corpus, TextCorpus) else corpus
                for corpus in corpora
            ]
        self._loader = StreamLoader(
            MakeLogicalShards(
                corpora,
                [source.weight for source in self.sources.training],
                self.num_logical_shards,
                self.shuffle_buffer,
                str(self.seed),
                self.row_shape,
                held_out,
            ),
            self.num_logical_shards,
            self.batch_size,
            batches=trainer.max_steps * trainer.accumulate_grad_batches,
            # With reload_dataloaders_every_n_epochs Lightning asks again at each epoch; the run continues all the same.
            state=self.state_dict() if self._loader else self._state,
            overfit=overfit_batches > 0,
            workers=self.num_workers,
            batches_per_step=trainer.accumulate_grad_batches,
            ranks=AllRanks() if share["replicas"] > 1 else OneRank(),
            **share,
        )
        return self._loader

    # -- position -----------------------------------------------------------------------------------------------------

    def source_counts(self) -> dict[str, dict[str, int]]:
        """Count by source the documents and tokens trained on, and the documents left out because they are validated
        on: of the logical shards of this rank; without a loader, of all logical shards."""
        state = self._loader.state_dict() if self._loader else self._state
        states = state["logical_shards"].values() if state else []
        return {
            source.title: {
                kind: sum(logical_shard[kind][index] for logical_shard in states)
                for kind in ("documents", "tokens", "held_out")
            }
            for index, source in enumerate(self.sources.training)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every logical shard of all ranks after the batch last handed over, in plain numbers. All
        ranks call this together."""
        if self._loader is None:
            return self._state or {}
        state = self._loader.state_dict()
        state["logical_shards"] = self._loader.ranks.merge(state["logical_shards"])
        return state | {IDENTITY: self._known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state, self._loader = state_dict, None
        super().load_state_dict(state_dict)

    def on_exception(self, exception: BaseException) -> None:
        """Save a checkpoint from which to resume after the data failed. For any other exception there is none here,
        because it may be this rank's alone, and saving needs all ranks."""
        super().on_exception(exception)
        trainer = self.trainer
        if isinstance(exception, StreamError) and trainer is not None and trainer.global_step:
            folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
            self._known = (self._known or {}) | {"failed": True}
            file = Path(folder) / f"data-failed-step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(file)
            if not file.exists():
                return  # a warning said that it could not be written
            rank_zero_warn(f"the data failed; when it can be read again, resume with --ckpt_path {file}")

    # -- identity -----------------------------------------------------------------------------------------------------

    def _remember(self, state: dict[str, Any], training: bool, path: object = "the checkpoint") -> None:
        super()._remember(state, training, path)
        self.retry.started = training
        # The command line calls this before setup. From Python it may come after setup, which then looked up the newest
        # commits and has to be done again at those of the run.
        if self.sources.pin(state[IDENTITY]) and self.sources.validation_corpus is not None:
            self.prepare_data()
            self.setup(self._stage)

    def _settings(self) -> Identity:
        return {
            "fixed": {
                "num_logical_shards": self.num_logical_shards,
                "seed": self.seed,
                "shuffle_buffer": self.shuffle_buffer,
                "rows": self.row_type,
            },
            "free": {
                "sequence_length": self.sequence_length,
                "mask_documents": self.mask_documents,
                "validation_tokens": self.validation_tokens,
            },
        }

    def _identity(self) -> Identity:
        tokenizer = {"name": self.tokenizer_name, "fingerprint": self.tokenizer.fingerprint()}
        return self._settings() | {"tokenizer": tokenizer} | self.sources.identity()
