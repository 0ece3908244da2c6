"""Read JSON Lines and Parquet as numbered rows of text, from any row on. All text in these formats is read here.

``datasets`` is not used for these two formats. Its JSON reader has no line numbers, and reads a file with a bad line
again from the start after it yielded half of it. Its retries continue to read a dead connection. For other formats,
:func:`read_table` reads a stream of ``datasets``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cola_lightning.data.lines import COMPRESSED, LinePlace, read_lines
from cola_lightning.data.passes import WHOLE, Share
from cola_lightning.data.remote import ignores_ranges, is_local, open_file, path_of
from cola_lightning.data.text_values import cell_text, json_text
from cola_lightning.errors import InputError

TABLE_ROWS = 256
PARQUET_BUFFER = 4 << 20  # bytes

Row = tuple[int, str | None]
"""Number of a row, and its text; None for null."""


def read_file(
    name: str, column: str, start: int = 0, share: Share = WHOLE, size: int | None = None
) -> Iterator[Row] | None:
    """Read the rows of a share of a file, or return None if the file is of neither format.

    In Parquet, rows are numbered from 0. In JSON Lines, the number of a row is the byte at which its line begins if
    ``size`` is given, else the index of the line, from 0.

    Args:
        name: Path or address, compressed or not.
        column: Key or column of the text.
        start: Smallest number of a row to read.
        share: Part of the file to read: a range of rows in Parquet, a range of bytes in JSON Lines if ``size`` is
            given, else every n-th line.
        size: Bytes of a file of plain JSON Lines (:func:`is_plain_lines`); None if not known.

    Raises:
        InputError: While iterating, for a broken row or a missing column; names file and place.
    """
    if is_lines(name):
        return _read_json_lines(name, column, start, share, size)
    if is_parquet(name):
        return _read_parquet(name, column, start, share)
    return None


def is_lines(name: str) -> bool:
    """Whether a file holds JSON Lines, compressed or not."""
    stem = path_of(name)
    for suffix in COMPRESSED:
        stem = stem.removesuffix(suffix)
    return stem.endswith((".json", ".jsonl", ".ndjson"))


def is_plain_lines(name: str) -> bool:
    """Whether a file holds uncompressed JSON Lines, which can be read from any byte on."""
    return is_lines(name) and not path_of(name).endswith(COMPRESSED)


def is_parquet(name: str) -> bool:
    """Whether a file is Parquet, which has a count of its rows and can be read from any row on."""
    return path_of(name).endswith(".parquet")


def _read_json_lines(name: str, column: str, start: int, share: Share, size: int | None) -> Iterator[Row]:
    """Read lines. Lines that are skipped are not parsed. An empty line is a row without text."""
    place = LinePlace(name)
    if size is not None:
        begin, end = share.bounds(size)
        for place.offset, line in read_lines(name, max(begin, start), end):
            yield place.offset, json_text(line, column, place) if line.strip() else ""
        return
    for number, (offset, line) in enumerate(read_lines(name)):
        if number >= start and share.has(number):
            place.number, place.offset = number + 1, offset
            yield number, json_text(line, column, place) if line.strip() else ""


def _read_parquet(name: str, column: str, start: int, share: Share) -> Iterator[Row]:
    """Read a range of rows. Of a row group that overlaps it, only the column is read; others are skipped."""
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
    """Look up the number of rows of a Parquet file in its footer."""
    with _open_parquet(name) as (table, _):
        return table.metadata.num_rows


@contextmanager
def _open_parquet(name: str) -> Iterator[tuple[pq.ParquetFile, str]]:
    # fsspec's cache is off, because Arrow asks exactly for the bytes that it needs: the footer and one column. Each
    # request is for at most PARQUET_BUFFER bytes, so that memory does not grow with the size of a row group.
    uncached = {} if is_local(name) else {"cache_type": "none"}
    with open_file(name, **uncached) as file:
        try:
            yield pq.ParquetFile(file, buffer_size=PARQUET_BUFFER), name
        except pa.ArrowInvalid as error:
            raise InputError(f"{name} is not a whole Parquet file: {error}") from error
        except ValueError as error:
            if isinstance(error, InputError) or not ignores_ranges(error):
                raise
            raise InputError(
                f"{name} is on a server that sends no parts of a file (HTTP Range), which Parquet needs; download the "
                f"file, and name it on this machine"
            ) from error


def read_table(table: Any, name: str, column: str, start: int, share: Share) -> Iterator[Row]:
    """Yield rows of a ``datasets.IterableDataset`` that holds one shard, as :func:`read_file` does.

    A share is every n-th row.

    Raises:
        InputError: As :func:`read_file`.
    """
    from datasets.exceptions import DatasetsError

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
            yield number, cell_text(value, f"{name} row {number}", column)


def _check_column(columns: list[str], name: str, column: str) -> None:
    if column not in columns:
        raise InputError(f"{name} has no column {column!r} (it has {columns}); set text_column to the right one")
