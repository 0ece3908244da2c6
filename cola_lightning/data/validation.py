"""The validation set: the first tokens of a source, tokenized once and kept on disk."""

import hashlib
import json
import shutil
from itertools import islice
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pyarrow as pa

from cola_lightning.data.cache import is_whole
from cola_lightning.data.held_out import ONE_IN, may_be_held_out
from cola_lightning.data.logical_shards import ENCODE_BATCH_SIZE
from cola_lightning.data.prepared import PreparedCorpus
from cola_lightning.data.readers import is_local
from cola_lightning.data.rows import Documents
from cola_lightning.data.sources import TextCorpus
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError


class ValidationSet:
    """Documents from the beginning of a corpus, until they make a number of tokens.

    Args:
        corpus: The documents.
        tokenizer: Makes their ids, and is part of what the cache is found by.
        tokens: How many.
        longest: Tokens of a document that count, because its row is cut there; None for all.
        cache_dir: Where they are kept, in a folder whose name tells everything that they depend on.
        shared: Whether the documents are trained on too; then only some are taken, by a hash of their places.
    """

    def __init__(
        self,
        corpus: TextCorpus | PreparedCorpus,
        tokenizer: Tokenizer,
        tokens: int,
        longest: int | None,
        cache_dir: Path,
        shared: bool = False,
    ) -> None:
        self.corpus, self.tokens, self.longest, self.shared = corpus, tokens, longest, shared
        if isinstance(corpus, TextCorpus):
            # Times too, because of large files only samples are looked at.
            times = [Path(name).stat().st_mtime_ns if is_local(name) else 0 for name in corpus.shards]
            source: Any = [corpus.column, corpus.shards, corpus.fingerprints, times]
        else:
            source = corpus.index
        content = json.dumps([source, tokenizer.fingerprint(), tokens, longest, shared])
        self.folder = cache_dir / f"validation-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def make(self) -> None:
        """Tokenize, unless that was done before.

        Raises:
            InputError: If there is no document.
        """
        if is_whole(self.folder, self.load):
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(mkdtemp(dir=self.folder.parent, prefix=".making-"))
        try:
            documents = self._documents()
            np.save(scratch / "ids.npy", np.concatenate(documents))
            np.save(scratch / "offsets.npy", np.cumsum([0, *map(len, documents)], dtype=np.int32))
            try:
                scratch.rename(self.folder)
            except OSError:
                if not self.folder.exists():  # else another run was quicker, with the same content
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def load(self) -> Documents:
        ids, offsets = (pa.array(np.load(self.folder / name, mmap_mode="r")) for name in ("ids.npy", "offsets.npy"))
        return Documents(pa.chunked_array([pa.ListArray.from_arrays(offsets, ids)]))

    def _documents(self) -> list[np.ndarray]:
        documents: list[np.ndarray] = []
        tokens = 0
        shards = range(len(self.corpus.shards))
        texts = (
            document
            for shard in shards
            for row, document in self.corpus.read(shard)
            if not self.shared or may_be_held_out(self.corpus.shards[shard], row)
        )
        while some := list(islice(texts, ENCODE_BATCH_SIZE)):
            for ids in self.corpus.encode(some):
                documents.append(ids)
                tokens += min(len(ids), self.longest or len(ids))
                if tokens >= self.tokens:
                    return documents
        if not documents:
            few = f" (of a split that is trained on too, one of {ONE_IN} is)" if self.shared else ""
            raise InputError(f"{self.corpus.title} has no document to validate on{few}")
        return documents
