"""Write and read rows of matrices in the state of callbacks, each rank its own, in a folder of shards.

A callback's state may hold :class:`~cola_lightning.optim.rows.Rows`. A rank writes its part of each into its file,
``rows/RANK.safetensors`` of the checkpoint, and the state names the entry. Another number of ranks can read them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from typing_extensions import TypedDict

from cola_lightning.errors import InputError
from cola_lightning.optim.rows import Rows, chunk
from cola_lightning.stored_data import ALTERED, Count, check_stored

FOLDER = "rows"
ENTRY = "entry_of_row_files"
"""Key of the dict that takes the place of ``Rows`` in a stored state."""


class _Entry(TypedDict):
    entry_of_row_files: str
    total: Count


def take_rows(state: Any, taken: dict[str, Rows], name: str = "") -> Any:
    """Move the ``Rows`` in a state of dicts and lists into ``taken``, and return the state that names them."""
    if isinstance(state, Rows):
        taken[name] = state
        return {ENTRY: name, "total": state.total}
    if isinstance(state, dict):
        return {key: take_rows(value, taken, f"{name}.{key}") for key, value in state.items()}
    if isinstance(state, list):
        return [take_rows(value, taken, f"{name}.{index}") for index, value in enumerate(state)]
    return state


def write_rows(checkpoint: Path, rows: dict[str, Rows], rank: int) -> None:
    """Write a rank's part of each entry into its file.

    Raises:
        OSError: If it cannot be written.
    """
    (checkpoint / FOLDER).mkdir(exist_ok=True)
    try:
        parts = {name: part.cpu().contiguous() for name, (part, _, _) in rows.items()}
        save_file(parts, checkpoint / FOLDER / f"{rank:05}.safetensors")
    except SafetensorError as error:  # a full disk
        raise OSError(str(error)) from None


def put_rows(state: Any, checkpoint: Path, ranks: int, rank: int) -> Any:
    """Return a stored state with one rank's ``Rows`` in place of the names of entries.

    Args:
        state: A result of :func:`take_rows`.
        checkpoint: Folder with the files of all ranks of the run that wrote them.
        ranks: Number of ranks of this run.
        rank: This one.

    Raises:
        InputError: If the files do not hold what the state names.
    """
    if isinstance(state, dict) and ENTRY in state:
        check_stored(state, _Entry, checkpoint, ALTERED)
        name, total = state[ENTRY], state["total"]
        own = chunk(total, ranks, rank)
        try:
            part = read_rows(sorted((checkpoint / FOLDER).glob("*.safetensors")), name, total, own)
        except (SafetensorError, OSError, RuntimeError, TypeError) as error:
            raise InputError(f"{checkpoint / FOLDER} is damaged ({error}); take another checkpoint") from None
        if len(part) != own.stop - own.start:
            raise InputError(f"{checkpoint / FOLDER} lacks rows of {name}; take another checkpoint")
        return Rows(part, own, total)
    if isinstance(state, dict):
        return {key: put_rows(value, checkpoint, ranks, rank) for key, value in state.items()}
    if isinstance(state, list):
        return [put_rows(value, checkpoint, ranks, rank) for value in state]
    return state


def read_rows(files: Sequence[Path], name: str, total: int, wanted: slice) -> torch.Tensor:
    """Read some rows of an entry of ``total`` rows from the files of all ranks. Other rows are not read."""
    parts = []
    for rank, file in enumerate(files):
        theirs = chunk(total, len(files), rank)
        first, end = max(wanted.start, theirs.start), min(wanted.stop, theirs.stop)
        if first < end or rank == 0:  # the first tells dtype and columns, even if no row of it is wanted
            with safe_open(file, "pt") as content:
                found = content.get_slice(name)
                parts.append(found[first - theirs.start : end - theirs.start] if first < end else found[0:0])
    return torch.cat(parts)
