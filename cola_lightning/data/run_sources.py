"""The sources of a streamed run: which it trains on, which it validates on, and at which commits of the hub."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_info

from cola_lightning.data.identity import Identity
from cola_lightning.data.prepared import PreparedCorpus, is_prepared
from cola_lightning.data.retry import Retry
from cola_lightning.data.source_lookup import Corpus, SourceLookup
from cola_lightning.data.sources import Source, check_weights
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.distributed.ranks import ask_once


class RunSources:
    """Finds and opens the sources of a run, and describes what was opened.

    Args:
        training: Sources that the run trains on, mixed by their tokens.
        validation: Source of the validation documents; if not given, split ``validation`` of the first of ``training``.
        retry: Retries reads that fail.

    Attributes:
        corpora: The sources that are trained on, set by :meth:`open`; none where nothing is trained.
        validation_corpus: The source that is validated on, set by :meth:`open`.

    Raises:
        InputError: If the weights are no shares, or a source is named twice.
    """

    def __init__(self, training: list[Source], validation: Source | None, retry: Retry) -> None:
        check_weights(training)
        self.training, self.validation = training, validation or replace(training[0], split="validation")
        self._revisions = [source.revision for source in self.all]  # as the user named them
        self._lookup = SourceLookup(retry)
        self.corpora: list[Corpus] = []
        self.validation_corpus: Corpus | None = None

    @property
    def all(self) -> list[Source]:
        """The sources that are trained on, and last that of validation."""
        return [*self.training, self.validation]

    @property
    def is_validation_shared(self) -> bool:
        """Whether the split that is validated on is trained on too."""
        return any(
            replace(source, weight=1.0) == replace(self.validation, weight=1.0, text_column=source.text_column)
            for source in self.training
        )

    def verify(self) -> None:
        """Compare the files of prepared sources with their checksums.

        Raises:
            InputError: For the first file that differs.
        """
        for source in filter(is_prepared, self.all):
            PreparedCorpus(source).verify()

    def load_tokenizer(self, name: str | None) -> Tokenizer:
        """Load the tokenizer of that name, or by default that of these sources; see :class:`SourceLookup`."""
        return self._lookup.load_tokenizer(self.all, name)

    def look_up(self, load_tokenizer: Callable[[], object], training: bool) -> None:
        """Ask other machines for what the run needs: rank 0 does, and tells the other ranks, which all call this. With
        what it found, opening a corpus takes no request.

        Args:
            load_tokenizer: Loads the tokenizer, by :meth:`load_tokenizer`.
            training: Whether the run trains.

        Raises:
            InputError: If a source or the tokenizer does not exist.
        """

        def ask() -> SourceLookup:
            load_tokenizer()
            for source in self.all if training else [self.validation]:
                if not is_prepared(source):
                    self._lookup.find(source)
            return self._lookup

        self._lookup = ask_once(ask)

    def open(self, tokenizer: Tokenizer, training: bool) -> None:
        """Open the sources as corpora: all of them, or only that of validation if the run does not train.

        Raises:
            InputError: If a source does not exist, or was prepared with another tokenizer.
        """
        if training:
            self.corpora = [self._lookup.open(source, tokenizer) for source in self.training]
        self.validation_corpus = self.open_validation(tokenizer)

    def open_validation(self, tokenizer: Tokenizer) -> Corpus:
        """Return the source that is validated on as a corpus; raises as :meth:`open`."""
        return self._lookup.open(self.validation, tokenizer)

    def describe(self, num_logical_shards: int) -> Iterator[str]:
        """Yield lines about each corpus: how much it holds, and what was left out."""
        assert self.validation_corpus is not None, "open comes before"
        for source, corpus in zip(self.training, self.corpora, strict=False):  # no corpora where nothing is trained
            for line in self._lookup.describe(source, corpus, num_logical_shards):
                yield f"train on {line}"
        for line in self._lookup.describe(self.validation, self.validation_corpus):
            yield f"validate on {line}"

    def identity(self) -> Identity:
        """Describe in a few plain values the corpora that are open, for the identity of the run's data."""
        assert self.validation_corpus is not None, "open comes before"
        training = [
            corpus.identity() | {"revision": revision, "weight": source.weight}
            for corpus, source, revision in zip(self.corpora, self.training, self._revisions, strict=False)
        ]
        validation = self.validation_corpus.identity() | {"revision": self._revisions[-1]}
        return {"validation": validation} | ({"sources": training} if training else {})

    def pin(self, began: Identity) -> bool:
        """Pin each source to the commit of the hub that the run began with, unless another revision is named now. A
        line tells of each that is pinned.

        Args:
            began: Identity of the data that the run began with.

        Returns:
            Whether a source is read at another commit than before.
        """
        named, before = self.all, [*began["sources"], began["validation"]]
        if len(before) != len(named):  # compare_runs refuses that in words
            return False
        pinned = [
            replace(source, revision=then["commit"])
            if source.title == then["title"] and revision == then["revision"] and then["commit"]
            else source
            for source, revision, then in zip(named, self._revisions, before, strict=True)
        ]
        changed = [(now.title, now.revision) for now, source in zip(pinned, named, strict=True) if now != source]
        for title, commit in dict.fromkeys(changed):
            rank_zero_info(f"{title} is read at commit {commit}, which the run began with")
        *self.training, self.validation = pinned
        return bool(changed)
