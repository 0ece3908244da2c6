"""Tokenize a source once, into the folder that :mod:`cola_lightning.data.prepared` reads."""

import json
import os
import warnings
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import TypedDict

from cola_lightning.data.encoding import ENCODE_BATCH_SIZE, encode_in_batches
from cola_lightning.data.identity import StoredSource
from cola_lightning.data.prepared import FORMAT, INDEX, PLAN, TOKENIZER, StoredShard, sha256
from cola_lightning.data.retry import Retry
from cola_lightning.data.sources import Source, TextCorpus
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.data.worker_process import end_with_parent
from cola_lightning.errors import InputError, check_at_least, hide_secrets
from cola_lightning.output_files import write_whole
from cola_lightning.stored_data import check_stored, read_json


def prepare(
    source: Source,
    folder: str,
    splits: list[str] | None = None,
    tokenizer: str = "t5-base",
    num_workers: int = 2,
    retries: int = 6,
    retry_wait: float = 2.0,
) -> None:
    """Tokenize a source into shards with checksums that can be memory-mapped, one for each shard of the source.

    A shard is written under another name and renamed when it is complete. A second call after an interruption makes the
    missing shards, from the commit of the hub that the first call read. It makes a shard again if its source changed.

    Args:
        source: Data set to tokenize.
        folder: Output folder, with a folder for each split. To train on it, name it as --data.path.
        splits: Splits to tokenize; the split of the source if not given.
        tokenizer: Folder, tokenizer.json or repository on the hub.
        num_workers: Processes that tokenize, each a shard at a time. With 1, this process does.
        retries: Failures in a row that are retried when a shard is read.
        retry_wait: Seconds before the first retry; each further wait is twice as long.

    Raises:
        InputError: If the source cannot be read or is empty, or the folder holds something else.
    """
    check_at_least(1, num_workers=num_workers)
    retry = Retry(retries, retry_wait)
    encoder = Tokenizer.load(tokenizer, retry)
    revision = source.revision
    for split in splits or [source.split]:
        target = Path(folder).expanduser() / split
        begun = _begun(target)
        same = begun if begun and begun.get("format") == FORMAT and source.revision == begun["revision"] else None
        if same and (commit := same["identity"]["commit"]):
            revision = commit
            rank_zero_info(f"{source.title} is read at commit {commit}, which {target} was begun with")
        corpus = TextCorpus(replace(source, split=split, revision=revision), encoder, retry)
        _prepare_split(corpus, target, source.revision, num_workers)
        revision = corpus.identity()["commit"] or revision  # all splits are of one commit


class _Plan(TypedDict):
    identity: StoredSource
    revision: str | None


def _prepare_split(corpus: TextCorpus, folder: Path, revision: str | None, num_workers: int) -> None:
    dtype = "<u2" if corpus.tokenizer.vocab_size <= 2**16 else "<i4"
    fixed = {
        "format": FORMAT,
        "source": corpus.title,
        "revision": revision,
        "column": corpus.column,
        "tokenizer": corpus.tokenizer.fingerprint(),
        "tokenizer_name": corpus.tokenizer.name,
        "dtype": dtype,
        "shards": corpus.shards,
    }
    plan = fixed | {"identity": corpus.identity()}
    begun = _begun(folder)
    if begun:
        for name, value in fixed.items():
            if begun.get(name) != value:
                raise InputError(f"{folder} was begun with another {name}; choose another --folder, or delete it")
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} holds something else; choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    missing = _missing(corpus, folder)
    if missing:  # an index means that all shards are there
        (folder / INDEX).unlink(missing_ok=True)
    _write(folder / PLAN, plan)
    corpus.tokenizer.save(folder / TOKENIZER)
    _make(corpus, folder, missing, dtype, num_workers)
    shards = [read_json(folder / _record(shard)) for shard in range(len(corpus.shards))]
    totals = {name: sum(shard[name] for shard in shards) for name in ("documents", "tokens")}
    if not totals["documents"]:
        raise InputError(f"{corpus.title} split {corpus.split!r} has no document; every text is empty")
    del plan["shards"]
    _write(folder / INDEX, {**plan, **totals, "shards": shards})


def _begun(folder: Path) -> dict[str, Any] | None:
    """Read the plan of a folder that an earlier call began; None if there is none.

    Raises:
        InputError: If the plan is damaged.
    """
    file, remedy = folder / PLAN, "choose another --folder, or delete this one"
    plan = read_json(file, remedy) if file.exists() else None
    if plan and plan.get("format") == FORMAT:
        check_stored(plan, _Plan, file, remedy)
    return plan


def _missing(corpus: TextCorpus, folder: Path) -> list[int]:
    """List the shards to make: those without a record, and those whose source changed."""
    missing, changed = [], []
    for shard, fingerprint in enumerate(corpus.fingerprints):
        try:
            record = read_json(folder / _record(shard), kind=StoredShard)
        except InputError:  # there is none, or it is damaged
            missing.append(shard)
            continue
        if record["fingerprint"] != fingerprint:
            changed.append(shard)
    if changed:
        warnings.warn(
            hide_secrets(
                f"{len(changed)} of {len(corpus.shards)} shards changed since they were tokenized, the first "
                f"{corpus.shards[changed[0]]}; they are tokenized again. A run that began with the old ones cannot "
                f"resume with these"
            ),
            stacklevel=2,
        )
        (folder / INDEX).unlink(missing_ok=True)
        for shard in changed:
            (folder / _record(shard)).unlink()
    return sorted(missing + changed)


def _make(corpus: TextCorpus, folder: Path, missing: list[int], dtype: str, num_workers: int) -> None:
    """Make the shards in parallel. After a failure, no further shard is begun."""
    context = get_context("spawn")  # because the threads of a tokenizer do not exist after a fork
    documents = context.Value("q", 0)
    job = (corpus, folder, dtype, documents)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    pool: Executor
    if num_workers > 1:
        pool = ProcessPoolExecutor(num_workers, context, _begin_process, (os.getpid(), *job))
    else:
        pool = ThreadPoolExecutor(1, initializer=_begin, initargs=job)
    with Progress(*columns) as progress, pool:
        task = progress.add_task("", total=len(corpus.shards), completed=len(corpus.shards) - len(missing))
        waiting: set[Future[None]] = {pool.submit(_make_shard, shard) for shard in missing}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                text = f"{corpus.title} {corpus.split}: {documents.value:,} documents, shards"
                progress.update(task, advance=len(done), description=text)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_job: tuple[TextCorpus, Path, str, Any]


def _begin(corpus: TextCorpus, folder: Path, dtype: str, documents: Any) -> None:
    """Set the job of this process. ``documents`` is a number that all processes share."""
    global _job
    _job = corpus, folder, dtype, documents


def _begin_process(parent: int, *job: Any) -> None:
    end_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # because the processes use all cores already
    _begin(*job)


def _make_shard(shard: int) -> None:
    """Tokenize one shard, and write its files and its record; see :mod:`cola_lightning.data.prepared`."""
    corpus, folder, dtype, documents = _job
    size = corpus.size(shard)
    offsets, kept = [0], []  # kept: numbers of the rows that have text
    with (folder / f"{shard:05}.ids.bin.part").open("wb") as file:
        for row, ids in encode_in_batches(corpus.read(shard), corpus.encode):
            if size is None:
                # Rows without text are empty. If rows 0 and 3 have 5 and 7 ids: offsets [0, 5, 5, 5, 12].
                offsets.extend([offsets[-1]] * (row + 1 - len(offsets)))
            file.write(ids.astype(dtype).tobytes())
            offsets.append(offsets[-1] + len(ids))
            kept.append(row)
            if len(kept) % ENCODE_BATCH_SIZE == 0:
                with documents.get_lock():
                    documents.value += ENCODE_BATCH_SIZE
    if (rows := corpus.rows(shard)) is not None:  # rows without text at the end
        offsets.extend([offsets[-1]] * (rows + 1 - len(offsets)))
    with documents.get_lock():
        documents.value += len(kept) % ENCODE_BATCH_SIZE
    arrays = {f"{shard:05}.offsets.npy": offsets} | ({} if size is None else {f"{shard:05}.rows.npy": kept})
    for name, values in arrays.items():
        with (folder / f"{name}.part").open("wb") as file:
            np.save(file, np.array(values, dtype=np.int64))
    files = {}
    for name in (f"{shard:05}.ids.bin", *arrays):
        data = folder / f"{name}.part"
        files[name] = {"bytes": data.stat().st_size, "sha256": sha256(data)}
        data.replace(folder / name)
    record = {
        "source": corpus.shards[shard],
        "fingerprint": corpus.fingerprints[shard],
        "record": _record(shard),
        "size": size,
        "documents": len(kept),
        "tokens": offsets[-1],
        "files": files,
    }
    _write(folder / _record(shard), record)


def _record(shard: int) -> str:
    return f"{shard:05}.json"


def _write(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, json.dumps(content, indent=1))
