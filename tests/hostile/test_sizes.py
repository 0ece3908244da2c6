"""Refuse files that unpack to more than memory holds, or are too large."""

import gzip
import time
import tracemalloc

import pytest

from cola_lightning.data.lines import LONGEST, read_lines
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError


@pytest.mark.slow
def test_a_compressed_line_without_end_is_refused(tmp_path):
    """A file of 0.2 MB unpacks to 200 MB of zeros without an end of line."""
    file = tmp_path / "bomb.jsonl.gz"
    with gzip.open(file, "wb") as archive:
        archive.write(bytes(LONGEST + LONGEST // 2))
    assert file.stat().st_size < 2**20
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(InputError, match="has a line of more than 134,217,728 bytes"):
        list(read_lines(str(file)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**29
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_of_a_tokenizer_that_is_too_large_is_not_read(tmp_path, texts, name):
    Tokenizer.train(texts, 300).save(tmp_path)
    with (tmp_path / name).open("r+b") as file:
        file.truncate(2**40)  # sparse, so it takes no space
    with pytest.raises(InputError, match="has 1,099,511,627,776 bytes; a file of a tokenizer has"):
        Tokenizer.load(str(tmp_path))
