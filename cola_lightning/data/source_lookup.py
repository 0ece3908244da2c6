"""Look up the files of the sources of a run, open them as corpora, and describe them."""

import json
from collections.abc import Iterator
from pathlib import Path

from cola_lightning.data.inventory import describe, describe_repeated_reads
from cola_lightning.data.prepared import PreparedCorpus, is_prepared
from cola_lightning.data.retry import Retry
from cola_lightning.data.sources import Found, Source, TextCorpus, find
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError

Corpus = TextCorpus | PreparedCorpus


class SourceLookup:
    """Opens sources. Each data set is looked up once in a process.

    Args:
        retry: Retries requests that fail.

    Attributes:
        found: Files that were looked up, by data set.
        tokenizer: Tokenizer that was loaded.

    It can be sent to other ranks, which then send no requests.
    """

    def __init__(self, retry: Retry) -> None:
        self.retry = retry
        self.found: dict[str, Found] = {}
        self.tokenizer: Tokenizer | None = None

    def find(self, source: Source) -> Found:
        """Find the files of a source. Two splits of a data set are found together.

        Raises:
            InputError: If the data set does not exist.
        """
        key = json.dumps([source.path, source.name, source.revision, source.data_files])
        if key not in self.found:
            self.found[key] = find(source, self.retry)
        return self.found[key]

    def open(self, source: Source, tokenizer: Tokenizer) -> Corpus:
        """Open a source, streamed or prepared.

        Raises:
            InputError: If the source does not exist, or was prepared with another tokenizer.
        """
        if not is_prepared(source):
            return TextCorpus(source, tokenizer, self.retry, self.find(source))
        corpus = PreparedCorpus(source)
        if corpus.index["tokenizer"] != tokenizer.fingerprint():
            raise InputError(
                f"{corpus.folder} was prepared with another tokenizer than {tokenizer.name}; leave --data.tokenizer "
                f"out, or prepare it again"
            )
        return corpus

    def load_tokenizer(self, sources: list[Source], name: str | None) -> Tokenizer:
        """Load the tokenizer of a run. A prepared source contains its tokenizer, so that no hub is needed.

        Args:
            sources: All sources of the run.
            name: Name that the user gave; None for the tokenizer of the first prepared source, or t5-base.
        """
        prepared = map(PreparedCorpus, filter(is_prepared, sources))
        if self.tokenizer is None:
            own = next((corpus for corpus in prepared if name in (None, corpus.index["tokenizer_name"])), None)
            self.tokenizer = own.tokenizer() if own else Tokenizer.load(name or "t5-base", self.retry)
        return self.tokenizer

    def describe(self, source: Source, corpus: Corpus, num_logical_shards: int | None = None) -> Iterator[str]:
        """Yield lines that say how much a corpus holds, and what of its folders was left out.

        Args:
            source: The source.
            corpus: The corpus that was opened from it.
            num_logical_shards: Logical shards that train on it, which decide how often a pass reads a file; None if it
                is validated on.
        """
        if isinstance(corpus, PreparedCorpus):
            facts = corpus.index
            yield (
                f"{corpus.title}: {len(corpus.shards):,} files, {facts['documents']:,} documents, "
                f"{facts['tokens']:,} tokens, prepared"
            )
            return
        found = self.find(source)
        yield from describe(
            corpus.title,
            corpus.shards,
            folders=[source.path] if Path(source.path).expanduser().is_dir() and not source.data_files else [],
            filesystem=found.filesystem,
            others=[name for split, names in found.files.items() if split != source.split for name in names],
            repeated=found.repeated.get(source.split, 0),
            left_out=found.unfinished.get(source.split, []),
        )
        if num_logical_shards:
            yield from describe_repeated_reads(corpus.title, corpus.shards, num_logical_shards)
