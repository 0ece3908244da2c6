"""Reads with dropped connections, busy servers and damaged shards."""

import gzip
import json
import random
import re
import time
import warnings
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import islice
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from cola_lightning.data import C4DataModule, retry
from cola_lightning.data.retry import Retry
from cola_lightning.data.sources import Source, TextCorpus
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from tests.data.conftest import arguments, write_shard
from tests.data.server import Server
from tests.data.test_streaming import ready, take

NAME = "c4-train.00000-of-00001.json.gz"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Make three megabytes that compress little.

    A client may not return the last hundred kilobytes that it received before a connection broke.
    """
    draw = random.Random(0)
    return [f"{number} {draw.randbytes(500).hex()}" for number in range(3000)]


@pytest.fixture
def server(tmp_path, texts):
    write_shard(tmp_path / NAME, texts)
    server = Server(tmp_path)
    yield server
    server.close()


@pytest.fixture(scope="module")
def tokenizer(c4) -> Tokenizer:
    return Tokenizer.load(f"{c4}/tokenizer")


def corpus(server, tokenizer, times=3) -> TextCorpus:
    source = Source("json", data_files={"train": f"{server.url}/{NAME}"})
    return TextCorpus(source, tokenizer, Retry(times, wait=0.01))


@pytest.mark.slow
@pytest.mark.parametrize("faults", [[0.3], [0.0, 0.5], [429, 503, 0.7], [500, 0.4, 0.8], [None, 0.999]], ids=str)
@pytest.mark.parametrize(("start", "ranges"), [(0, "none"), (1000, "none"), (500, "bytes")])
def test_every_document_is_read_once_and_in_order_despite_transient_errors(
    server, tokenizer, texts, faults, start, ranges
):
    server.ranges = ranges
    stream = corpus(server, tokenizer)
    server.faults[NAME] = list(faults)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = list(stream.read(0, start))
    assert rows == list(enumerate(texts))[start:]
    failures = sum(fault is not None for fault in faults)
    warned = [str(warning.message) for warning in caught if NAME in str(warning.message)]
    assert len(warned) == failures - (None in faults)
    assert all(re.search(r"; try \d of 3 in \d", message) for message in warned)


def test_only_failures_in_a_row_are_counted():
    def three_at_a_time(start):
        yield from ((number, number) for number in range(start, min(start + 3, 20)))
        if start + 3 < 20:
            raise ConnectionResetError

    with pytest.warns(UserWarning, match="ConnectionResetError: no reason given; try 1 of 1"):
        assert list(Retry(1, wait=0.01).iterate(three_at_a_time, "shard", 0)) == [(n, n) for n in range(20)]


class BusyError(ConnectionError):
    def __init__(self, retry_after: str) -> None:
        super().__init__("429 Too Many Requests")
        self.response = SimpleNamespace(status_code=429, headers={"Retry-After": retry_after})


@pytest.mark.parametrize(("value", "least"), [("7", 7), ("0", 0.01), ("nonsense", 0.01), ("a date", 60)])
def test_a_busy_server_is_asked_again_after_the_time_that_it_states(monkeypatch, value, least):
    if value == "a date":
        value = format_datetime(datetime.now(UTC) + timedelta(seconds=90))
    pauses = []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    answers = iter([BusyError(value), None])

    def ask():
        if error := next(answers):
            raise error
        return "read"

    with pytest.warns(UserWarning, match="429"):
        assert Retry(1, wait=0.01).call(ask, "shard") == "read"
    [pause] = pauses
    assert least <= pause <= 1.25 * max(least, 90 if least == 60 else 0.01)


def test_a_cycle_of_causes_is_followed_once():
    def ask():
        try:
            try:
                raise ConnectionError("first")
            except ConnectionError as error:
                raise ValueError("second") from error
        except ValueError as error:
            raise error.__cause__ from None

    with pytest.raises(InputError, match="first"):
        Retry(0, wait=0.01).call(ask, "shard")


def test_offline_mode_of_a_client_is_an_error_at_once():
    def ask():
        try:
            raise OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled")
        except OfflineModeIsEnabled as error:
            raise ConnectionError("Couldn't reach 'allenai/c4' on the Hub") from error

    with pytest.raises(InputError, match="allenai/c4/en is not on this machine, and HF_HUB_OFFLINE is set"):
        Retry(9, wait=100).call(ask, "allenai/c4/en")


def test_waiting_for_a_server_is_reported(monkeypatch):
    monkeypatch.setattr(retry, "SILENCE", 0.05)
    with pytest.warns(UserWarning, match="waiting for allenai/c4/en to answer, for 0 s so far"):
        Retry().call(lambda: time.sleep(0.3), "allenai/c4/en")


def test_permanent_errors_are_raised_at_once():
    with pytest.raises(ZeroDivisionError):
        Retry(9, wait=100).call(lambda: 1 // 0, "shard")


@pytest.mark.parametrize(("fault", "reason"), [(503, "503"), (429, "429"), (0.0, "ClientPayloadError|Disconnected")])
def test_last_try_is_an_error_that_names_the_shard_and_the_row(server, tokenizer, fault, reason):
    stream = corpus(server, tokenizer)
    rows = stream.read(0)
    assert len(list(islice(rows, 10))) == 10
    server.faults[NAME] = [fault] * 10
    with (
        pytest.warns(UserWarning, match=NAME),
        pytest.raises(InputError, match=f"{NAME} .*could not be read in 4 tries: .*({reason})"),
    ):
        list(stream.read(0, 10))


def test_a_missing_file_is_an_error_at_once(server, tokenizer):
    stream = corpus(server, tokenizer)
    server.faults[NAME] = [404] * 10
    with pytest.raises(InputError, match=f"{NAME} .*cannot be read: .*(FileNotFoundError|404)"):
        list(stream.read(0))
    assert server.requests.count(NAME) <= 2


def test_a_truncated_shard_is_an_error_and_not_its_end(server, tokenizer, tmp_path, texts):
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[: len(whole) // 2])
    read = []
    with (
        pytest.warns(UserWarning, match="EOFError"),
        pytest.raises(InputError, match=rf"{NAME} \(row \d+\) could not be read in 4 tries: EOFError"),
    ):
        read.extend(corpus(server, tokenizer).read(0))
    stream = corpus(server, tokenizer)
    with warnings.catch_warnings(action="ignore"):
        for row, text in stream.read(0):
            assert text == texts[row]
            if row > 1000:
                (tmp_path / NAME).write_bytes(whole)  # uploaded again
                break


def test_a_broken_line_is_an_error_with_its_number_and_is_not_retried(server, tokenizer, tmp_path):
    with gzip.open(tmp_path / NAME, "wt") as lines:
        lines.write(json.dumps({"text": "one"}) + "\n" + '{"text": "two\n' + json.dumps({"text": "three"}) + "\n")
    stream = corpus(server, tokenizer)
    server.requests.clear()
    with pytest.raises(InputError, match=rf"{NAME} line 2 is not JSON: .* at column \d+"):
        list(stream.read(0))
    assert server.requests.count(NAME) == 1


def test_damaged_bytes_are_an_error(server, tokenizer, tmp_path):
    content = bytearray((tmp_path / NAME).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / NAME).write_bytes(content)
    with warnings.catch_warnings(action="ignore"), pytest.raises(InputError, match=NAME):
        list(corpus(server, tokenizer).read(0))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_despite_transient_errors_equal_those_of_local_files(c4, workers):
    server = Server(c4)
    names = [f"c4-train.{number:05}-of-00005.json.gz" for number in range(5)]
    files = {
        "train": [f"{server.url}/{name}" for name in names],
        "validation": f"{server.url}/c4-validation.00000-of-00001.json.gz",
    }
    here = arguments(c4, rows="packed", num_workers=workers)
    expected = take(ready(C4DataModule(**here)), 40)
    with warnings.catch_warnings(action="ignore"):
        server.faults[names[3]] = [503]  # in the check that the file exists
        data = ready(C4DataModule(**here | {"data_files": files}))
        for name in names:
            server.faults[name] = [503, 429, 0.5]
        batches = take(data, 40)
    server.close()
    assert all((one["input_ids"] == other["input_ids"]).all() for one, other in zip(expected, batches, strict=True))
    assert sum(not server.faults[name] for name in names) >= 4  # a fifth may not be reached
