"""A server that accepts connections and never answers: the time until the run stops, and its messages."""

import socket
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from cola_lightning.data import C4DataModule, remote, retry, sources
from cola_lightning.data.prepare import prepare
from cola_lightning.data.retry import Retry
from cola_lightning.data.sources import Found, Source, TextCorpus, find
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from tests.data.conftest import arguments
from tests.data.server import Server, SilentServer
from tests.data.test_retry import BusyError
from tests.data.test_streaming import ready

PAGE = Path(__file__).parents[2] / "recipes/data_loading/README.md"
pytestmark = pytest.mark.filterwarnings("ignore:.*; try .* of")

TIMEOUT = 0.02  # seconds, in place of the 30 of ``remote.ANSWER``
TRIES = Retry().times + 1
PAUSES = sum(Retry().wait * 2**number for number in range(Retry().times))


@pytest.fixture
def server():
    server = SilentServer()
    yield server
    server.close()


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """Record the pauses between tries, in seconds, instead of sleeping, so that the default settings are measured."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def impatience(monkeypatch):
    """Wait ``TIMEOUT`` for an answer. Only for the silent server: a busy machine's server can take longer to answer."""
    monkeypatch.setattr(remote, "ANSWER", TIMEOUT)


@pytest.fixture
def silent_hub(server, monkeypatch, tmp_path):
    """Make the client of the Hugging Face hub ask the silent server, with short timeouts."""
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_ETAG_TIMEOUT": 0.01,
        "HF_HUB_DOWNLOAD_TIMEOUT": 0.01,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.file_download, "_ETAG_RETRY_TIMEOUT", 0.01)
    monkeypatch.setattr(sources, "CONNECT", 0.01)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # was read when datasets was imported
    return server


def stream(c4, url, folder):
    """Look up the training files."""
    settings = arguments(c4, cache_dir=str(folder), retry_wait=Retry().wait)
    ready(C4DataModule(**settings | {"data_files": {"train": url, "validation": settings["data_files"]["validation"]}}))


def validation(c4, url, folder):
    """Look up the validation files."""
    settings = arguments(c4, cache_dir=str(folder), retry_wait=Retry().wait)
    ready(C4DataModule(**settings | {"data_files": {"train": settings["data_files"]["train"], "validation": url}}))


def prepared(c4, url, folder):
    prepare(Source("json", data_files=url), str(folder), tokenizer=f"{c4}/tokenizer", num_workers=1)


def fingerprints(c4, url, folder):
    """Ask for the sizes and tags of files that were looked up."""
    return TextCorpus(Source("json", data_files=url), None, Retry(), Found({"train": [url]})).fingerprints


def read(c4, url, folder):
    """Read a file that was looked up."""
    list(TextCorpus(Source("json", data_files=url), None, Retry(), Found({"train": [url]})).read(0))


# To look up a file takes one request, to open it two: fsspec asks by HEAD, and after a failure by GET.
@pytest.mark.parametrize(
    ("door", "requests"), [(stream, 1), (validation, 1), (prepared, 1), (fingerprints, 2), (read, 2)]
)
def test_waiting_for_a_silent_server_ends_after_the_stated_time(
    c4, server, pauses, impatience, tmp_path, door, requests
):
    url = f"{server.url}/shard.json.gz"
    began = time.monotonic()
    with pytest.warns(UserWarning, match=f"{url}.*; try 6 of 6 in"), pytest.raises(InputError) as error:
        door(c4, url, tmp_path / "made")
    waited = time.monotonic() - began
    assert str(error.value).startswith(url)
    assert f"could not be read in {TRIES} tries" in str(error.value)
    assert "\n" not in str(error.value)
    assert server.requests == TRIES * requests
    assert PAUSES <= sum(pauses) <= 1.25 * PAUSES
    assert len(pauses) == Retry().times
    assert TRIES * requests * TIMEOUT <= waited < TRIES * requests * TIMEOUT + 20  # and the work of a busy machine


def test_the_page_states_the_real_times():
    assert (TRIES, PAUSES, remote.CONNECT, remote.ANSWER) == (7, 126, 15, 30)
    text = " ".join(PAGE.read_text().split())
    for requests in (1, 2):
        least = TRIES * requests * remote.ANSWER + PAUSES
        most = TRIES * requests * remote.ANSWER + 1.25 * PAUSES
        assert f"{TRIES} x {requests * remote.ANSWER:.0f} s + 126 s = {least:.0f} s, at most {most:.0f} s" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("door", "name"),
    [
        (lambda: Tokenizer.load("someone/tokenizer", Retry()), r"tokenizer someone/tokenizer \(tokenizer.json\)"),
        (lambda: find(Source("allenai/c4", "en"), Retry()), "allenai/c4/en"),
    ],
    ids=["tokenizer", "data set"],
)
def test_waiting_for_a_silent_hub_ends_and_names_what_was_asked_for(silent_hub, pauses, door, name):
    with (
        pytest.warns(UserWarning, match=f"{name}: .*; try 6 of 6 in"),
        pytest.raises(InputError, match=f"^{name} could not be read in 7 tries: .*(timed out|Couldn't reach)"),
    ):
        door()
    # The hub's client has retries of its own, so that each of the 7 tries is several requests.
    assert silent_hub.requests > TRIES
    assert sum(pauses) >= PAUSES


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Make sleeping take no time, and the clock of ``retry`` go on by it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    clock.monotonic, clock.sleep, clock.time = lambda: clock.now, time.sleep, time.time
    monkeypatch.setattr(retry, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("door", "name"),
    [
        (lambda: Tokenizer.load("someone/tokenizer", Retry()), r"tokenizer someone/tokenizer \(tokenizer.json\)"),
        (lambda: find(Source("allenai/c4", "en"), Retry()), "allenai/c4/en"),
    ],
    ids=["tokenizer", "data set"],
)
@pytest.mark.parametrize("fault", ["refused", "unknown"])
def test_a_run_that_finds_no_network_at_its_start_says_so_within_30_s(
    silent_hub, clock, monkeypatch, door, name, fault
):
    def unknown(*address, **options):
        raise socket.gaierror(-2, "Name or service not known")

    silent_hub.close()  # nothing listens on its port now
    if fault == "unknown":
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    line = f"^{name} cannot be read, because {silent_hub.url} cannot be reached .*; check the network, or name files"
    with pytest.raises(InputError, match=line) as error:
        door()
    assert "\n" not in str(error.value)
    assert 20 < clock.now <= 30  # the hub's client retries for 23 s by itself


def test_a_network_that_fails_after_the_start_is_waited_for(clock):
    def ask():
        raise ConnectionRefusedError("[Errno 111] Connection refused")

    with pytest.raises(InputError, match="shard could not be read in 7 tries"):
        Retry().call(ask, "shard")
    assert PAUSES <= clock.now <= 1.25 * PAUSES


@pytest.mark.parametrize(("answered", "started"), [(False, False), (True, False), (False, True)])
def test_a_server_that_answered_before_is_waited_for(clock, answered, started):
    """One that never answered is given up after pauses of 2, 4 and 8 s, because the next try would end after 30 s."""
    answers = iter([BusyError("0")] * answered + [ConnectionRefusedError()] * 9)

    def ask():
        raise next(answers)

    waits = answered or started
    with pytest.raises(InputError, match="in 7 tries" if waits else "http://hub cannot be reached"):
        Retry(started=started).call(ask, "data", "http://hub")
    least = PAUSES if waits else 14
    assert least <= clock.now <= 1.25 * least


@pytest.mark.parametrize(("status", "door"), [(429, fingerprints), (503, fingerprints), (503, read)])
def test_a_server_that_is_busy_for_head_and_get_is_asked_again(c4, pauses, status, door):
    """fsspec then raises FileNotFoundError, which would be a permanent error."""
    server = Server(c4)
    name = "c4-train.00000-of-00005.json.gz"
    server.head_faults[name], server.faults[name] = [status], [status]
    with pytest.warns(UserWarning, match=f"{name}.*: ClientResponseError: {status}.*; try 1 of 6"):
        door(c4, f"{server.url}/{name}", None)
    server.close()
    assert len(pauses) == 1


def test_a_file_that_is_missing_for_head_and_get_is_an_error_at_once(c4, pauses):
    server = Server(c4)
    with pytest.raises(InputError, match=r"none.json cannot be read: FileNotFoundError"):
        read(c4, f"{server.url}/none.json", None)
    server.close()
    assert not pauses
