"""Tables of results for the terminal."""

from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

Line = Callable[[dict[str, Any]], str]
"""Writes what a line of a table says about a result."""


def table_console() -> Console:
    """Return a console that is as wide as the terminal; without one 140 characters, which every table fits into."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    return console


def make_table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    """Make a table whose first column is aligned to the left, the others to the right."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        made.add_row(*row)
    return made


def side_by_side(title: str, results: list[dict[str, Any]], lines: dict[str, Line]) -> Table:
    """Make a table with a column for each result, headed by its ``name``, and with lines by their labels."""
    rows = [(label, *(line(result) for result in results)) for label, line in lines.items()]
    return make_table(title, ("", *(result["name"] for result in results)), rows)
