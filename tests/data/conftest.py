import gzip
import json
import os
import random
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from cola_lightning.data import Source
from cola_lightning.data.prepare import prepare
from cola_lightning.data.tokenizer import Tokenizer
from tests.data.simulate import RUNS

os.environ["OMP_NUM_THREADS"] = "1"
# No test needs a network; datasets would ask the hub to count each opening of a local file. The first two lines are for
# processes that the tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

WORDS = ("the", "of", "and", "nation", "people", "congress", "war", "peace", "year", "upon", "great", "law")


def write_shard(file: Path, texts: list[str]) -> Path:
    """Write one shard in the layout of C4."""
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        for text in texts:
            lines.write(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://x"}) + "\n")
    return file


def sentences(name: str, number: int) -> list[str]:
    """Make documents of 3 to 60 words, each with a different first word."""
    draw = random.Random(name)
    return [f"{name}{index} " + " ".join(draw.choices(WORDS, k=draw.randint(3, 60))) for index in range(number)]


def fake_trainer(**settings) -> SimpleNamespace:
    """Make an object with the attributes that a data module reads from its trainer."""
    asked = {"max_steps": 9, "accumulate_grad_batches": 1, "overfit_batches": 0.0, "distributed_sampler_kwargs": None}
    return SimpleNamespace(**asked | settings)


@pytest.fixture(autouse=True)
def _runs_end_with_their_test():
    yield
    while RUNS:
        RUNS.pop().close()


@pytest.fixture(scope="session")
def c4(tmp_path_factory) -> Path:
    """Make a folder in C4's layout: five training shards of unequal size, one validation shard, and a tokenizer."""
    folder = tmp_path_factory.mktemp("c4")
    texts = {number: sentences(chr(ord("a") + number), 20 + 7 * number) for number in range(5)}
    texts[2][3:5] = ["", "  \n"]
    for number, some in texts.items():
        write_shard(folder / f"c4-train.{number:05}-of-00005.json.gz", some)
    write_shard(folder / "c4-validation.00000-of-00001.json.gz", sentences("v", 40))
    Tokenizer.train([text for some in texts.values() for text in some], 300).save(folder / "tokenizer")
    return folder


def arguments(c4: Path, **others) -> dict:
    """Return arguments of a C4DataModule that streams the folder."""
    return {
        "path": "json",
        "name": None,
        "data_files": {split: f"{c4}/c4-{split}*.json.gz" for split in ("train", "validation")},
        "tokenizer": f"{c4}/tokenizer",
        "sequence_length": 32,
        "batch_size": 2,
        "shuffle_buffer": 8,
        "num_logical_shards": 4,
        "validation_tokens": 500,
        "num_workers": 0,
        "retry_wait": 0.01,
        "cache_dir": f"{c4}/cache",
    } | others


@pytest.fixture(scope="session")
def prepared(c4, tmp_path_factory) -> Path:
    """Tokenize that folder."""
    folder = tmp_path_factory.mktemp("prepared") / "c4"
    source = Source("json", data_files=arguments(c4)["data_files"])
    prepare(source, str(folder), ["train", "validation"], f"{c4}/tokenizer", num_workers=1)
    return folder


@pytest.fixture(scope="session")
def begun(tmp_path_factory):
    """Return a function that makes a kind of data once, with the state of a run on it."""

    @cache
    def begun(kind):
        data = kind(tmp_path_factory.mktemp(kind.__name__))
        return data, json.loads(json.dumps(data.begin().state_dict()))

    return begun


@pytest.fixture
def case(begun, tmp_path, request):
    """Yield one kind of data at its original paths, and the state of its run; restore the data after the test."""
    kind = request.param
    data, state = begun(kind)
    shutil.copytree(data.folder, tmp_path / "kept", copy_function=shutil.copy2)
    copy = kind.__new__(kind)
    copy.folder, copy.text = data.folder, data.text
    copy.options = {
        key: [Source(**vars(source)) for source in value] if key == "sources" else value
        for key, value in data.options.items()
    }
    yield copy, state
    shutil.rmtree(data.folder)
    (tmp_path / "kept").rename(data.folder)
