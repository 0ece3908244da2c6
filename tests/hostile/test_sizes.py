"""Files that unpack, or claim, to be more than a machine holds."""

import gzip
import time
import tracemalloc

import pytest

from cola_lightning.data.lines import LONGEST, read_lines
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError


@pytest.mark.slow
def test_a_compressed_line_without_end_is_refused(tmp_path):
    """A file of a fifth of a megabyte holds 200 MB of zeros and no end of line."""
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
def test_a_tokenizer_larger_than_any_is_refused_unread(tmp_path, texts, name):
    Tokenizer.train(texts, 300).save(tmp_path)
    with (tmp_path / name).open("r+b") as file:
        file.truncate(2**40)  # sparse: takes no room
    with pytest.raises(InputError, match="has 1,099,511,627,776 bytes; a file of a tokenizer has"):
        Tokenizer.load(str(tmp_path))
