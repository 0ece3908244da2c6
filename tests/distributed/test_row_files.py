"""Rows of matrices in the state of callbacks, written by each rank and read by another number of ranks."""

import pytest
import torch

from cola_lightning.distributed.row_files import put_rows, take_rows, write_rows
from cola_lightning.errors import InputError
from cola_lightning.optim.rows import Rows, chunk

MATRIX = torch.arange(21.0).view(7, 3)


def write(folder, ranks):
    """Write the matrix as each of some ranks does, and return the stored state."""
    for rank in range(ranks):
        own, taken = chunk(7, ranks, rank), {}
        state = {"Callback": {"pools": [{"A": Rows(MATRIX[own], own, 7)}], "seed": 3}}
        stored = take_rows(state, taken)
        write_rows(folder, taken, rank)
    return stored


@pytest.mark.parametrize("writers", [1, 2, 4, 5])
@pytest.mark.parametrize("readers", [1, 2, 3, 8])
def test_any_number_of_ranks_reads_the_rows_that_it_has(tmp_path, writers, readers):
    stored = write(tmp_path, writers)
    parts = []
    for rank in range(readers):
        found = put_rows(stored, tmp_path, readers, rank)
        assert found["Callback"]["seed"] == 3
        rows = found["Callback"]["pools"][0]["A"]
        assert (rows.own, rows.total) == (chunk(7, readers, rank), 7)
        assert len(rows.part) == rows.own.stop - rows.own.start
        parts.append(rows.part)
    assert torch.equal(torch.cat(parts), MATRIX)


def test_files_that_lack_rows_or_are_damaged_are_refused_in_one_line(tmp_path):
    stored = write(tmp_path, 2)
    file = tmp_path / "rows" / "00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(InputError, match=r"rows is damaged .*; take another checkpoint"):
        put_rows(stored, tmp_path, 1, 0)
    file.unlink()
    with pytest.raises(InputError, match=r"rows lacks rows of \.Callback\.pools\.0\.A; take another checkpoint"):
        put_rows(stored, tmp_path, 1, 0)
    stored["Callback"]["pools"][0]["A"]["total"] = "7"
    with pytest.raises(InputError, match="total"):
        put_rows(stored, tmp_path, 1, 0)
