"""Measure the throughput of the loaders: ``python recipes/data_loading/measure.py --help``."""

import os
import platform
import sys
import time
from collections.abc import Iterator
from datetime import date
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import load_dataset
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.data import DataLoader

from cola_lightning.data.packing import IGNORE, Batch
from cola_lightning.data.streaming import StreamingDataModule
from cola_lightning.data.tokenizer import Tokenizer

PLAIN = "`datasets` + `DataLoader`"


def measure(
    files: str,
    validation_files: str,
    tokenizer: str,
    prepared: str,
    batch_size: int = 32,
    sequence_length: int = 256,
    seconds: float = 3.0,
    times: int = 5,
    workers: tuple[int, ...] = (1, 2),
) -> None:
    """Print, as a table, the tokens a second of each loader alone: padding is not counted, nor the first batches. The
    loaders take turns, ``times`` rounds of ``seconds`` each. A figure is over all rounds together, because logical
    shards tokenize many documents at a time and nearly all at once; the range is that of the rounds. The ratio to plain
    ``datasets`` is one of tokens for a second of processor time of all processes, which other work on the machine
    changes little; tokens for a second of the clock want an idle machine.

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
    if sys.platform != "linux":
        sys.exit(f"error: processor times are read from /proc, which {sys.platform} lacks; run this on Linux")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sources: dict[str, dict[str, Any]] = {
        "streamed": {"path": "json", "data_files": {"train": files, "validation": validation_files}},
        "prepared": {"path": prepared},
    }
    common: dict[str, Any] = {"batch_size": batch_size, "sequence_length": sequence_length, "validation_tokens": 10_000}
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    cells: dict[tuple[str, str, int], Iterator[Batch]] = {}
    for count in workers:
        plain = _plain(files, Tokenizer.load(tokenizer), batch_size, sequence_length, count)
        cells[PLAIN, "padded", count] = plain
    for label, source in sources.items():
        for rows in ("padded", "packed"):
            for count in workers:
                data = _ready(
                    StreamingDataModule(**common, **source, tokenizer=tokenizer, rows=rows, num_workers=count)
                )
                cells[label, rows, count] = iter(data.train_dataloader())
    taken: dict[tuple[str, str, int], list[tuple[int, float, float]]] = {cell: [] for cell in cells}
    for (_, _, count), batches in cells.items():
        for _ in islice(batches, 4 * count):  # what was read ahead while the processes started
            pass
    for _ in range(times):
        for cell, batches in cells.items():
            taken[cell].append(_round(batches, seconds))
            time.sleep(0.3)  # until its workers have read ahead again, so that the next loader does not pay for it
    print("\n| loader | rows | workers | tokens/s | tokens/CPU-s (range) | to plain `datasets` |")
    print("|---|---|---|---|---|---|")
    for (label, rows, count), rounds in taken.items():
        wall, thrift = _speed(rounds)
        each = sorted(_speed([one])[1] for one in rounds)
        base = _speed(taken[PLAIN, "padded", count])[1]
        print(
            f"| {label} | {rows} | {count} | {wall:,.0f} | {thrift:,.0f} ({each[0]:,.0f} to {each[-1]:,.0f}) | "
            f"{thrift / base:.2f} |"
        )


def _round(batches: Iterator[Batch], seconds: float) -> tuple[int, float, float]:
    """Return the tokens, the seconds, and the processor time of this process and its workers in seconds."""
    tokens = 0
    begin, used = time.perf_counter(), _processor_time()
    while time.perf_counter() - begin < seconds:
        tokens += int((next(batches)["labels"] != IGNORE).sum())
    return tokens, time.perf_counter() - begin, _processor_time() - used


def _speed(rounds: list[tuple[int, float, float]]) -> tuple[float, float]:
    """Return the tokens per second, and per second of processor time, over all rounds."""
    tokens, wall, processor = (sum(values) for values in zip(*rounds, strict=True))
    return tokens / wall, tokens / processor


def _processor_time() -> float:
    """Return the processor time, in seconds, of this process and its workers, those that ended included."""
    stats = [Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split() for child in active_children()]
    ticks = sum(int(stat[11]) + int(stat[12]) for stat in stats)
    import resource  # which Windows lacks

    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK") + ended.ru_utime + ended.ru_stime


def _ready(data: StreamingDataModule) -> StreamingDataModule:
    trainer = {"max_steps": 10**9, "accumulate_grad_batches": 1, "distributed_sampler_kwargs": None}
    data.trainer = SimpleNamespace(**trainer, overfit_batches=0)  # type: ignore[assignment]
    data.prepare_data()
    data.setup("fit")
    return data


def _plain(files: str, tokenizer: Tokenizer, batch_size: int, length: int, workers: int) -> Iterator[Batch]:
    """Stream as the papers' scripts do, with the same tokenizer: a shuffle buffer, and one document per row."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Tensor]]:
        rows = [_pad(torch.tensor(ids), length, tokenizer.pad_id or 0) for ids in tokenizer.encode(batch["text"])]
        return {name: [row[name] for row in rows] for name in ("input_ids", "labels")}

    stream = load_dataset("json", data_files=files, split="train", streaming=True).shuffle(seed=42, buffer_size=1000)
    stream = stream.map(
        encode,
        batched=True,
        batch_size=64,
        remove_columns=["text", "timestamp", "url"],
    )
    while True:
        yield from DataLoader(stream.with_format("torch"), batch_size=batch_size, num_workers=workers)


def _pad(ids: Tensor, length: int, pad_id: int) -> Batch:
    if len(ids) > length:
        ids = torch.cat((ids[: length - 1], ids[-1:]))
    row = {"input_ids": torch.full((length,), pad_id), "labels": torch.full((length,), IGNORE)}
    for values in row.values():
        values[: len(ids)] = ids
    return row


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
