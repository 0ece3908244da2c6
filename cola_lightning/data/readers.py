"""Read JSON Lines and Parquet as numbered rows of text, from any row on; all that reads text reads it here.

``datasets`` is not used for these two: its JSON reader knows no line numbers, reads a file with an odd line once more
from the start after half of it was yielded, and its own retries go on reading a connection that is dead. Other formats
that it can stream come through :func:`read_table`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

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

    The number of a row is, in Parquet, that of the row. In JSON Lines it is the byte at which the line begins if
    ``size`` is given, else the number of the line, from 0.

    Args:
        name: Path or address, compressed or not.
        column: Key or column of the text.
        start: Smallest number of a row that is wanted.
        share: Which part of the file. It is a range of rows in Parquet, a range of bytes in JSON Lines of which
            ``size`` is given, and every so many lines in others.
        size: Bytes of a file of plain JSON Lines (:func:`is_plain_lines`); None if they are not known.

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
    """Whether a file holds JSON Lines that are not compressed, and so can be read from any byte on."""
    return is_lines(name) and not path_of(name).endswith(COMPRESSED)


def is_parquet(name: str) -> bool:
    """Whether a file is Parquet, which tells its number of rows and can be read from any row on."""
    return path_of(name).endswith(".parquet")


def _read_json_lines(name: str, column: str, start: int, share: Share, size: int | None) -> Iterator[Row]:
    """Lines that are skipped are not parsed. An empty line is a row without text."""
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
    """A share is a range of the rows. Only the row groups that it touches are read, and of them only the column."""
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
    """Count the rows of a Parquet file, which its end tells."""
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
        except ValueError as error:
            if isinstance(error, InputError) or not ignores_ranges(error):
                raise
            raise InputError(
                f"{name} is on a server that sends no parts of a file (HTTP Range), which Parquet needs; fetch the "
                f"file, and name it on this machine"
            ) from error


def read_table(table: Any, name: str, column: str, start: int, share: Share) -> Iterator[Row]:
    """Yield rows as :func:`read_file` does, out of a ``datasets.IterableDataset`` that holds one shard.

    A share is every so many rows.

    Raises:
        InputError: As :func:`read_file`.
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
            yield number, cell_text(value, f"{name} row {number}", column)


def _check_column(columns: list[str], name: str, column: str) -> None:
    if column not in columns:
        raise InputError(f"{name} has no column {column!r} (it has {columns}); set text_column to the right one")
