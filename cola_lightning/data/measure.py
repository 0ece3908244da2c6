"""How fast the loaders are: ``python -m cola_lightning.data.measure --help``."""

import os
import platform
import time
from collections.abc import Iterator
from datetime import date
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import load_dataset
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.data import DataLoader

from cola_lightning.data.c4 import C4DataModule
from cola_lightning.data.rows import IGNORE, pad
from cola_lightning.data.tokenizer import Tokenizer

Batch = dict[str, Tensor]


def measure(
    files: str,
    validation_files: str,
    tokenizer: str,
    prepared: str,
    batch_size: int = 32,
    sequence_length: int = 256,
    seconds: float = 6.0,
    times: int = 3,
    workers: tuple[int, ...] = (1, 2),
) -> None:
    """Print, as a table, the tokens a second of each loader alone: padding is not counted, nor the first batches. Each
    is measured several times and the best is printed, for on a machine that does other things the rest is noise; what
    it gives for a second of processor time is nearly free of that.

    Args:
        files: Pattern of gzip-JSON shards to stream.
        validation_files: Such shards to validate on; the data module wants them.
        tokenizer: Folder of the tokenizer.
        prepared: Folder that ``prepare`` made of the same files.
        batch_size: Rows of a batch (B).
        sequence_length: Tokens of a row (T).
        seconds: How long a loader is measured each time.
        times: How often.
        workers: Numbers of worker processes to measure with.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    streamed = {"path": "json", "data_files": {"train": files, "validation": validation_files}, "tokenizer": tokenizer}
    common = {"name": None, "batch_size": batch_size, "sequence_length": sequence_length, "validation_tokens": 10_000}
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print("\n| loader | rows | workers | tokens/s | tokens/CPU-s |\n|---|---|---|---|---|")
    for count in workers:
        plain = _plain(files, Tokenizer.load(tokenizer), batch_size, sequence_length, count)
        _report("`datasets` + `DataLoader`", "padded", count, plain, seconds, times)
    for label, source in (("streamed", streamed), ("prepared", {"path": prepared})):
        for rows in ("padded", "packed"):
            for count in workers:
                data = _ready(C4DataModule(**common, **source, rows=rows, num_workers=count))
                _report(label, rows, count, iter(data.train_dataloader()), seconds, times)


def _report(label: str, rows: str, workers: int, batches: Iterator[Batch], seconds: float, times: int) -> None:
    for _ in islice(batches, 4 * workers):  # what was read ahead while the processes started
        pass
    speed, thrift = (max(values) for values in zip(*(_speed(batches, seconds) for _ in range(times)), strict=True))
    print(f"| {label} | {rows} | {workers} | {speed:,.0f} | {thrift:,.0f} |", flush=True)


def _speed(batches: Iterator[Batch], seconds: float) -> tuple[float, float]:
    """Tokens for each second, and for each second of processor time of this process and its workers."""
    tokens = 0
    begin, used = time.perf_counter(), _processor_time()
    while time.perf_counter() - begin < seconds:
        tokens += int((next(batches)["labels"] != IGNORE).sum())
    return tokens / (time.perf_counter() - begin), tokens / (_processor_time() - used)


def _processor_time() -> float:
    stats = [Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split() for child in active_children()]
    ticks = sum(int(stat[11]) + int(stat[12]) for stat in stats)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _ready(data: C4DataModule) -> C4DataModule:
    trainer = {"max_steps": 10**9, "accumulate_grad_batches": 1, "distributed_sampler_kwargs": None}
    data.trainer = SimpleNamespace(**trainer, overfit_batches=0)  # type: ignore[assignment]
    data.prepare_data()
    data.setup("fit")
    return data


def _plain(files: str, tokenizer: Tokenizer, batch_size: int, length: int, workers: int) -> Iterator[Batch]:
    """What the scripts of this lineage do, with the same tokenizer: a stream, a shuffle buffer, one document a row."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Tensor]]:
        rows = [pad(torch.tensor(ids), length, tokenizer.pad_id or 0) for ids in tokenizer.encode(batch["text"])]
        return {name: [row[name] for row in rows] for name in ("input_ids", "labels")}

    stream = load_dataset("json", data_files=files, split="train", streaming=True).shuffle(seed=42, buffer_size=1000)
    stream = stream.map(encode, batched=True, batch_size=64, remove_columns=["text", "timestamp", "url"])
    while True:
        yield from DataLoader(stream.with_format("torch"), batch_size=batch_size, num_workers=workers)


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
