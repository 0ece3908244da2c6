"""Lay out names and texts in two columns that fit the terminal."""

import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

NARROWEST = 30
"""Fewest characters of the second column. With less, a text is put below its name."""


class Command(str):
    """A command to type. It is never wrapped, so that it can be copied in one piece."""


def as_typed(command: str) -> Command:
    """Begin a command of this package, or of one that it needs, as this process was begun.

    The programs of an environment that is not activated are not on the path.

    Example: ``cola_lightning estimate`` becomes ``.venv/bin/python -m cola_lightning estimate``, and ``tensorboard``
    becomes ``.venv/bin/tensorboard``, in a process that was begun by ``.venv/bin/python -m cola_lightning fit``.
    """
    python, *typed = sys.orig_argv
    if ("-m", "cola_lightning") not in pairwise(typed):
        return Command(command)
    program, _, rest = command.partition(" ")
    if program == "cola_lightning":
        return Command(f"{shlex.quote(python)} -m {command}")
    return Command(f"{shlex.quote(str(Path(python).with_name(program)))} {rest}")


def in_columns(entries: Iterable[tuple[str, str]], width: int | None = None, indent: str = "") -> list[str]:
    """Put names into a column, and their texts, wrapped, into a second one beside it.

    A word, such as a path, is not broken, and a :class:`Command` is not wrapped.

    Args:
        entries: Pairs of name and text.
        width: Characters of a line; those of the terminal if not given, and 80 without a terminal. 0 wraps nothing.
        indent: Beginning of each line.

    Returns:
        The lines.
    """
    entries = list(entries)
    width = shutil.get_terminal_size().columns if width is None else width
    first = max((len(name) for name, _ in entries), default=0) + 2
    if width and width - len(indent) - first < NARROWEST:
        below = indent + "    "
        return [
            line for name, text in entries for line in ((indent + name).rstrip(), *_wrap(text, below, below, width))
        ]
    lines = []
    for name, text in entries:
        begin = f"{indent}{name:<{first}}"
        lines += _wrap(text, begin, " " * len(begin), width) if width else [begin + text]
    return lines


def wrap_paragraph(text: str) -> list[str]:
    """Wrap a text to the terminal's width."""
    return _wrap(text, "", "", shutil.get_terminal_size().columns)


def _wrap(text: str, first: str, following: str, width: int) -> list[str]:
    if isinstance(text, Command):
        return [first + text]
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=following, break_long_words=False, break_on_hyphens=False
    ) or [first.rstrip()]
