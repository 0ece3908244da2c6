"""The validation set: the first documents of a source, tokenized once and kept on disk."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cola_lightning.data.cache import is_whole, new_folder
from cola_lightning.data.encoding import encode_in_batches
from cola_lightning.data.fingerprints import describe_content
from cola_lightning.data.held_out import ONE_IN, may_be_held_out
from cola_lightning.data.packing import Documents
from cola_lightning.data.prepared import PreparedCorpus
from cola_lightning.data.sources import TextCorpus
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError


@dataclass
class ValidationSet:
    """The first documents of a corpus that have a number of tokens together.

    Args:
        corpus: The documents.
        tokenizer: Tokenizer of the ids; the name of the cache folder depends on it.
        tokens: Number of tokens.
        longest: Tokens of a document that count at most, because its row is cut there; None for all.
        cache_dir: Folder of the cache folder, which has a name made from all that the documents depend on.
        shared: Whether the corpus is trained on too. Then only some documents are taken, by a hash of their places.
    """

    corpus: TextCorpus | PreparedCorpus
    tokenizer: Tokenizer
    tokens: int
    longest: int | None
    cache_dir: Path
    shared: bool = False

    def __post_init__(self) -> None:
        corpus = self.corpus
        if isinstance(corpus, TextCorpus):
            source: Any = [corpus.column, describe_content(corpus.shards, corpus.fingerprints)]
        else:
            source = corpus.index
        content = json.dumps([source, self.tokenizer.fingerprint(), self.tokens, self.longest, self.shared])
        self.folder = self.cache_dir / f"validation-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def make(self) -> None:
        """Tokenize the documents, unless the cache holds them.

        Raises:
            InputError: If there is no document.
        """
        if is_whole(self.folder, self.load):
            return
        with new_folder(self.folder) as (content, _):
            documents = self._documents()
            np.save(content / "ids.npy", np.concatenate(documents))
            np.save(content / "offsets.npy", np.cumsum([0, *map(len, documents)], dtype=np.int32))

    def load(self) -> Documents:
        """Load the documents from the cache; the ids stay on disk."""
        ids, offsets = (pa.array(np.load(self.folder / name, mmap_mode="r")) for name in ("ids.npy", "offsets.npy"))
        return Documents(pa.chunked_array([pa.ListArray.from_arrays(offsets, ids)]))

    def _documents(self) -> list[np.ndarray]:
        documents: list[np.ndarray] = []
        tokens = 0
        texts = (
            (None, document)
            for shard, name in enumerate(self.corpus.shards)
            for row, document in self.corpus.read(shard)
            if not self.shared or may_be_held_out(name, row)
        )
        for _, ids in encode_in_batches(texts, self.corpus.encode):
            documents.append(ids)
            tokens += min(len(ids), self.longest or len(ids))
            if tokens >= self.tokens:
                break
        if not documents:
            few = f" (of a split that is trained on too, one of {ONE_IN} is)" if self.shared else ""
            raise InputError(f"{self.corpus.title} has no document to validate on{few}")
        return documents
