"""One shard as numbered rows of text, from any row on.

JSON Lines and Parquet are read here rather than by ``datasets``: its JSON reader knows no line numbers, reads a file
with an odd line once more from the start after half of it was handed out, and its own retries go on reading a
connection that is dead. What else it can stream comes through :func:`read_table`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

from cola_lightning.data.passes import WHOLE, Share
from cola_lightning.data.readers import COMPRESSED, cell_text, json_text, read_lines
from cola_lightning.data.remote import is_local, open_file, path_of
from cola_lightning.errors import InputError

TABLE_ROWS = 256
PARQUET_BUFFER = 4 << 20  # bytes

Row = tuple[int, str]


def read_file(name: str, column: str, start: int, share: Share) -> Iterator[Row] | None:
    """Rows of a share of the file, from ``start`` on, or None if the file is of neither format.

    Args:
        name: Path or address, compressed or not.
        column: Key or column of the text.
        start: Number of the first row that is wanted, counted from the beginning of the file.
        share: Which part of the file; see :func:`in_ranges`.

    Raises:
        InputError: While iterating, for a broken row or a missing column; names file and place.
    """
    stem = _stem(name)
    if stem.endswith((".json", ".jsonl", ".ndjson")):
        return _json_lines(name, column, start, share)
    if stem.endswith(".parquet"):
        return _parquet(name, column, start, share)
    return None


def in_ranges(name: str) -> bool:
    """Whether a share of the file is a range of its rows, rather than every so many rows, because its format says how
    many rows there are and can be read from the middle."""
    return _stem(name).endswith(".parquet")


def _stem(name: str) -> str:
    stem = path_of(name)
    for suffix in COMPRESSED:
        stem = stem.removesuffix(suffix)
    return stem


def _json_lines(name: str, column: str, start: int, share: Share) -> Iterator[Row]:
    """A row is a line, so that what is skipped is not parsed; an empty line is a row without text."""
    for number, line in enumerate(read_lines(name)):
        if number >= start and share.has(number):
            yield number, (json_text(line, column, f"{name} line {number + 1}") or "") if line.strip() else ""


def _parquet(name: str, column: str, start: int, share: Share) -> Iterator[Row]:
    with _open_parquet(name) as (table, path):
        _check_column(table.schema_arrow.names, path, column)
        begin, end = share.bounds(table.metadata.num_rows)
        begin = max(begin, start)
        first = 0
        for group in range(table.num_row_groups):
            last = first + table.metadata.row_group(group).num_rows
            if last > begin and first < end:
                numbers = count(first)
                for batch in table.iter_batches(TABLE_ROWS, row_groups=[group], columns=[column]):
                    rows = _rows(batch.column(0), numbers, path, column, begin, WHOLE)
                    yield from takewhile(lambda row: row[0] < end, rows)
            first = last


def parquet_rows(name: str) -> int:
    """Number of rows of a Parquet file."""
    with _open_parquet(name) as (table, _):
        return table.metadata.num_rows


@contextmanager
def _open_parquet(name: str) -> Iterator[tuple[pq.ParquetFile, str]]:
    # Without a cache in between, because Arrow knows which bytes it needs: the last ones, and those of one column. They
    # come in requests of at most PARQUET_BUFFER bytes, so that a row group of any size takes little memory.
    uncached = {} if is_local(name) else {"cache_type": "none"}
    with open_file(name, **uncached) as file:
        try:
            yield pq.ParquetFile(file, buffer_size=PARQUET_BUFFER), name
        except pa.ArrowInvalid as error:
            raise InputError(f"{name} is not a whole Parquet file: {error}") from error


def read_table(table: Any, name: str, column: str, start: int, share: Share) -> Iterator[Row]:
    """As :func:`read_file`, of a ``datasets.IterableDataset`` that holds one shard.

    Raises:
        InputError: As there.
    """
    numbers = count()
    try:
        for batch in table.with_format("arrow").iter(batch_size=TABLE_ROWS):
            _check_column(batch.column_names, name, column)
            yield from _rows(batch.column(column), numbers, name, column, start, share)
    except (UnicodeDecodeError, pa.ArrowInvalid, DatasetsError) as error:
        raise InputError(f"{name} cannot be read: {str(error).splitlines()[0]}") from error


def _rows(values: Any, numbers: Iterator[int], name: str, column: str, start: int, share: Share) -> Iterator[Row]:
    for value, number in zip(values, numbers, strict=False):
        if number >= start and share.has(number):
            yield number, cell_text(value, f"{name} row {number}", column) or ""


def _check_column(columns: list[str], name: str, column: str) -> None:
    if column not in columns:
        raise InputError(f"{name} has no column {column!r} (it has {columns}); set text_column to the right one")
