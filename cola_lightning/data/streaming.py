"""The data module for text that is too much for this machine: streamed, or tokenized beforehand."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cola_lightning.data.cache import cache_folder
from cola_lightning.data.held_out import HeldOut
from cola_lightning.data.identity import Identity
from cola_lightning.data.inventory import describe
from cola_lightning.data.logical_shards import MakeLogicalShards, RowShape
from cola_lightning.data.prepared import PreparedCorpus, is_prepared
from cola_lightning.data.retry import Retry
from cola_lightning.data.rows import PackedRows, PaddedRows
from cola_lightning.data.sources import DataFiles, Found, Source, TextCorpus, find
from cola_lightning.data.stream_loader import LoaderState, OneRank, StreamError, StreamLoader
from cola_lightning.data.token_data_module import IDENTITY, StoredState, TokenDataModule, resolve_global_batch_size
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.data.validation import ValidationSet
from cola_lightning.distributed.ranks import ask_once
from cola_lightning.errors import InputError
from cola_lightning.host_memory import check_batch, check_memory, check_workers

Corpus = TextCorpus | PreparedCorpus


class _State(StoredState, LoaderState):
    pass


class C4DataModule(TokenDataModule):
    """Trains on a stream of documents, and goes on at the very next token after a break.

    The order of the batches is a function of the arguments alone. A checkpoint holds, for every logical shard (see
    :class:`StreamLoader`), where it stands after the batch trained on last. To go on from it costs the reading of one
    shuffle block for each logical shard, and in a compressed shard the unpacking of what comes before that block;
    nothing that was trained on is tokenized again. On another number of ranks or workers no document is lost or
    repeated, and where ranks x workers divides ``logical shards``, before and after, the batches stay the same
    sequence.

    Args:
        path: Data set on the Hugging Face hub, folder of files, format of ``datasets`` with ``data_files``, or folder
            that ``prepare`` made.
        name: Configuration of the data set; if not given, ``en`` for allenai/c4, and none for any other.
        revision: Branch, tag or commit on the hub. A run keeps to the commit that it began with.
        data_files: Files, patterns or addresses, by split.
        text_column: Column of the text.
        sources: Several sources in place of the one above, mixed by the tokens that each hands out.
        validation: Source of the validation documents; split ``validation`` of ``path``, or of the first of
            ``sources``, if not given. Where it is a split that is trained on too, one document of 20 is
            held out, by a hash of its place. No document that equals a validation document is trained on.
        tokenizer: Folder, tokenizer.json or repository on the hub. If none is named, the one that a prepared source was
            prepared with, or t5-base.
        sequence_length: Tokens of a row (T).
        batch_size: Rows of a micro-batch on one device (B).
        global_batch_size: Rows of an optimizer step over all devices; gradients are accumulated to it. If none is
            given, it is what the trainer's ``accumulate_grad_batches`` makes of ``batch_size``.
        global_batch_tokens: The same in tokens, in place of it: rows times ``sequence_length``.
        rows: ``padded`` makes one document a row, cut and padded, as the paper's benchmark does; ``packed`` puts
            documents end to end.
        mask_documents: Whether tokens of packed rows attend to the documents before theirs in the row.
        shuffle_buffer: Documents of a logical shard that are shuffled together; these are read before its first batch.
        num_logical_shards: Streams that the run is made of. Ranks x workers must not be more; it cannot change within a
            run.
        validation_tokens: Tokens of the validation set, which is the first documents of its source.
        seed: Decides the order of shards and documents.
        num_workers: Processes on each rank that read and tokenize ahead; 0 for none.
        retries: Failures in a row that are borne when a shard is read.
        retry_wait: Seconds before the first new try; each further wait is twice as long.
        verify: Compare prepared shards with their checksums before training.
        cache_dir: Where the tokenized validation set is kept; by default as for :class:`TextDataModule`.

    Raises:
        InputError: For values that cannot work.
    """

    _state_type = _State

    def __init__(
        self,
        path: str = "allenai/c4",
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
        if path == "allenai/c4" and name is None and data_files is None:
            name = "en"
        self.sources = sources or [Source(path, name, revision, "train", data_files, text_column)]
        self.validation = validation or replace(self.sources[0], split="validation")
        least = {
            "sequence_length": (sequence_length, 2),
            "batch_size": (batch_size, 1),
            "num_logical_shards": (num_logical_shards, 1),
        }
        for argument, (value, minimum) in least.items():
            if value < minimum:
                raise InputError(f"{argument} is {value}; it must be at least {minimum}")
        check_batch(batch_size, sequence_length)
        check_workers(num_workers)
        # The state of each is kept in a checkpoint, and its readers in memory.
        check_memory(
            num_logical_shards * 2**13,
            f"--data.num_logical_shards {num_logical_shards}",
            "take a small multiple of ranks x workers",
        )
        weights = {source.title: source.weight for source in self.sources}
        if len(weights) < len(self.sources):
            raise InputError("two sources have the same path and name; each may be named once")
        if any(weight <= 0 for weight in weights.values()) or abs(sum(weights.values()) - 1) > 1e-6:
            raise InputError(
                f"the weights of the sources are {weights}, in sum {sum(weights.values()):g}; they are shares of the "
                f"tokens, each above 0, and must sum to 1"
            )
        if mask_documents and rows == "padded":
            raise InputError("mask_documents is for packed rows; a padded row holds one document")
        self.tokenizer_name, self.sequence_length = tokenizer, sequence_length
        self.batch_size = batch_size
        self.global_batch_size = resolve_global_batch_size(global_batch_size, global_batch_tokens, sequence_length)
        self.row_type, self.mask_documents = rows, mask_documents
        self.shuffle_buffer, self.num_logical_shards, self.validation_tokens = (
            shuffle_buffer,
            num_logical_shards,
            validation_tokens,
        )
        self.seed, self.num_workers, self.verify = seed, num_workers, verify
        self.retry, self.cache_dir = Retry(retries, retry_wait), cache_folder(cache_dir)
        self._revisions = [source.revision for source in [*self.sources, self.validation]]  # as they were named
        self._loader: StreamLoader | None = None
        self._state: dict[str, Any] | None = None
        self._corpora: list[Corpus] = []
        self._held_out: Corpus | None = None
        self._found: dict[str, Found] = {}
        self._named_tokenizer: Tokenizer | None = None

    # -- sources ------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Check what was prepared, and tokenize the validation set unless the cache holds it; one process of a node
        does it."""
        if self.verify:
            for source in filter(is_prepared, [*self.sources, self.validation]):
                PreparedCorpus(source).verify()
        self._validation_set(self._load_tokenizer()).make()

    def setup(self, stage: str) -> None:
        self._stage = stage
        # Rank 0 asks the hub, and tells the others.
        self._found, self._named_tokenizer = ask_once(lambda: self._look_up(stage))
        self.tokenizer = self._load_tokenizer()
        pad_id = self.tokenizer.eos_id if self.tokenizer.pad_id is None else self.tokenizer.pad_id
        mask_documents = self.row_type == "packed" and self.mask_documents
        self.row_shape = RowShape(self.sequence_length, self.row_type == "packed", pad_id, mask_documents)
        if stage == "fit":
            self._loader = None  # a fit of its own begins where it is told to
            self._corpora = [self._open(source, self.tokenizer) for source in self.sources]
        validation = self._validation_set(self.tokenizer)
        self._held_out = validation.corpus
        self._compare()
        self._say_what_was_found()
        self._validation_documents = documents = validation.load()
        rank_zero_info(f"validate on {documents.summary()} of {validation.corpus.title}")
        if self.row_type == "packed":
            self.validation_rows = PackedRows(documents, self.sequence_length, pad_id, mask_documents)
        else:
            self.validation_rows = PaddedRows(documents, self.sequence_length, pad_id)

    def _look_up(self, stage: str) -> tuple[dict[str, Found], Tokenizer | None]:
        """What setup has to know of other machines."""
        self._load_tokenizer()
        for source in [*(self.sources if stage == "fit" else []), self.validation]:
            if not is_prepared(source):
                self._find(source)
        return self._found, self._named_tokenizer

    def _load_tokenizer(self) -> Tokenizer:
        tokenizer = self._choose_tokenizer(self._load_named_tokenizer)
        assert tokenizer is not None
        return tokenizer

    def _load_named_tokenizer(self) -> Tokenizer:
        if self._named_tokenizer is None:
            self._named_tokenizer = self._find_tokenizer()
        return self._named_tokenizer

    def _find_tokenizer(self) -> Tokenizer:
        for source in [*self.sources, self.validation]:
            if is_prepared(source):
                corpus = PreparedCorpus(source)
                # A prepared source brings its tokenizer, so that it can be trained on without the hub.
                if self.tokenizer_name in (None, corpus.index["tokenizer_name"]):
                    return corpus.tokenizer()
        return Tokenizer.load(self.tokenizer_name or "t5-base", self.retry)

    def _open(self, source: Source, tokenizer: Tokenizer) -> Corpus:
        if not is_prepared(source):
            return TextCorpus(source, tokenizer, self.retry, self._find(source))
        corpus = PreparedCorpus(source)
        if corpus.index["tokenizer"] != tokenizer.fingerprint():
            raise InputError(
                f"{corpus.folder} was prepared with another tokenizer than {tokenizer.name}; leave --data.tokenizer "
                f"out, or prepare it anew"
            )
        return corpus

    def _find(self, source: Source) -> Found:
        """The files of a source, looked up once in this process. Two splits of a data set are found together."""
        key = json.dumps([source.path, source.name, source.revision, source.data_files])
        if key not in self._found:
            self._found[key] = find(source, self.retry)
        return self._found[key]

    def _validation_set(self, tokenizer: Tokenizer) -> ValidationSet:
        longest = self.sequence_length if self.row_type == "padded" else None
        corpus = self._open(self.validation, tokenizer)
        shared = any(
            replace(source, weight=1.0) == replace(self.validation, weight=1.0, text_column=source.text_column)
            for source in self.sources
        )
        return ValidationSet(corpus, tokenizer, self.validation_tokens, longest, self.cache_dir, shared)

    def _say_what_was_found(self) -> None:
        for kind, sources, corpora in (
            ("train on", self.sources, self._corpora),
            ("validate on", [self.validation], [self._held_out]),
        ):
            for source, corpus in zip(sources, corpora, strict=False):
                if isinstance(corpus, PreparedCorpus):
                    facts = corpus.index
                    rank_zero_info(
                        f"{kind} {corpus.title}: {len(corpus.shards):,} files, {facts['documents']:,} documents, "
                        f"{facts['tokens']:,} tokens, prepared"
                    )
                elif corpus is not None:
                    folders = [source.path] if Path(source.path).expanduser().is_dir() and not source.data_files else []
                    found = self._find(source)
                    others = [name for split, names in found.files.items() if split != source.split for name in names]
                    for line in describe(
                        corpus.title,
                        corpus.shards,
                        folders,
                        found.filesystem,
                        others,
                        found.repeated.get(source.split, 0),
                        found.unfinished.get(source.split, []),
                    ):
                        rank_zero_info(f"{kind} {line}")

    # -- batches ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> StreamLoader:
        trainer = self.trainer
        assert trainer is not None
        if isinstance(trainer.overfit_batches, float) and trainer.overfit_batches > 0:
            raise InputError(
                f"--trainer.overfit_batches {trainer.overfit_batches} is a share of the data, but a stream has no "
                "length; state a number of batches"
            )
        check_batch(self.batch_size, self.sequence_length, trainer.accumulate_grad_batches)
        share = self._share()
        if self.num_workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads do not outlive the fork of a worker
        self._loader = StreamLoader(
            MakeLogicalShards(
                self._corpora,
                [source.weight for source in self.sources],
                self.num_logical_shards,
                self.shuffle_buffer,
                str(self.seed),
                self.row_shape,
                HeldOut(self._validation_documents),
            ),
            self.num_logical_shards,
            self.batch_size,
            batches=trainer.max_steps * trainer.accumulate_grad_batches,
            # Lightning may ask anew at each epoch, by reload_dataloaders_every_n_epochs; the run goes on all the same.
            state=self.state_dict() if self._loader else self._state,
            overfit=trainer.overfit_batches > 0,
            workers=self.num_workers,
            batches_per_step=trainer.accumulate_grad_batches,
            ranks=_Ranks() if share["replicas"] > 1 else None,
            **share,
        )
        return self._loader

    # -- position -----------------------------------------------------------------------------------------------------

    def ledger(self) -> dict[str, dict[str, int]]:
        """Documents and tokens trained on, and documents left out because they are validated on, by source, of the
        logical shards of this rank; on no trainer, of all logical shards."""
        state = self._loader.state_dict() if self._loader else self._state
        logical_shards = state["logical_shards"].values() if state else []
        return {
            source.title: {
                "documents": sum(logical_shard["documents"][index] for logical_shard in logical_shards),
                "tokens": sum(logical_shard["tokens"][index] for logical_shard in logical_shards),
                "held_out": sum(logical_shard["held_out"][index] for logical_shard in logical_shards),
            }
            for index, source in enumerate(self.sources)
        }

    def state_dict(self) -> dict[str, Any]:
        """Where every logical shard of every rank stands after the batch last handed over, in plain numbers; all ranks
        call it."""
        if self._loader is None:
            return self._state or {}
        state = self._loader.state_dict()
        states = self._loader.ranks.gather(state["logical_shards"])
        state["logical_shards"] = {logical_shard: value for other in states for logical_shard, value in other.items()}
        return state | {IDENTITY: self._known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state, self._loader = state_dict, None
        super().load_state_dict(state_dict)

    def on_exception(self, exception: BaseException) -> None:
        """Save a checkpoint to go on from where the data failed. Any other exception may be this rank's own, and the
        others would not take part."""
        trainer = self.trainer
        if isinstance(exception, StreamError) and trainer is not None and trainer.global_step:
            folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
            self._known = (self._known or {}) | {"failed": True}
            file = Path(folder) / f"data-failed-step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(file)
            if not file.exists():
                return  # that it could not be written was said
            rank_zero_warn(f"the data failed; when it can be read again, go on by --ckpt_path {file}")

    # -- identity -----------------------------------------------------------------------------------------------------

    def _remember(self, state: dict[str, Any], training: bool, path: object = "the checkpoint") -> None:
        super()._remember(state, training, path)
        if self._pin(state[IDENTITY]) and self._held_out:  # from Python, where this comes after setup
            self.prepare_data()
            self.setup(self._stage)

    def _pin(self, began: Identity) -> bool:
        """Keep to the commits that the run began with, unless another revision is named; say whether that changes
        anything."""
        named = [*self.sources, self.validation]
        pinned = []
        for source, revision, then in zip(
            named, self._revisions, [*began["sources"], began["validation"]], strict=False
        ):
            same = source.title == then["title"] and revision == then["revision"] and then["commit"]
            pinned.append(replace(source, revision=then["commit"]) if same else source)
        if len(pinned) != len(named) or pinned == named:
            return False
        *self.sources, self.validation = pinned
        kept = [
            (source.title, source.revision) for source, before in zip(pinned, named, strict=True) if source != before
        ]
        for title, commit in dict.fromkeys(kept):
            rank_zero_info(f"{title} is read at commit {commit}, which the run began with")
        return True

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
        assert self._held_out is not None
        sources = [
            corpus.identity() | {"revision": revision, "weight": source.weight}
            for corpus, source, revision in zip(self._corpora, self.sources, self._revisions, strict=False)
        ]
        found = {
            "tokenizer": {"name": self.tokenizer_name, "fingerprint": self.tokenizer.fingerprint()},
            "validation": self._held_out.identity() | {"revision": self._revisions[-1]},
        }
        return self._settings() | found | ({"sources": sources} if sources else {})


class _Ranks(OneRank):
    """Exchange between ranks in a process group on the CPU, so that nothing waits for the device."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo")

    def smallest(self, number: int) -> int:
        value = torch.tensor(number, dtype=torch.int32)
        dist.all_reduce(value, dist.ReduceOp.MIN, group=self.group)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values
