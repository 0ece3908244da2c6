"""A tokenizer is the same from a folder and from a server with the hub's protocol."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from cola_lightning.data.retry import Retry
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError

COMMIT = "1" * 40
WORDS = ["<pad>", "</s>", "<end>", "<unk>", "a", "b"]
DECODER = {"0": {"content": "<pad>", "special": True}}


class Hub:
    """Serves the folder ``files`` as the repository ``someone/tokenizer``. ``faults`` are answered first."""

    def __init__(self):
        self.files, self.faults, self.requests = None, {}, Counter()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                repository, _, file = self.path.strip("/").partition("/resolve/")
                name = file.partition("/")[2]
                hub.requests[name] += 1
                headers, body = {"X-Repo-Commit": COMMIT}, b""
                if hub.faults.get(name):
                    status, code = hub.faults[name].pop(0)
                    headers = {"X-Error-Code": code} if code else {}
                elif repository != "someone/tokenizer":
                    status, headers = 404, {"X-Error-Code": "RepoNotFound"}
                elif (hub.files / name).is_file():
                    status, body = 200, (hub.files / name).read_bytes()
                    headers["ETag"] = f'"{name}"'
                else:
                    status, headers["X-Error-Code"] = 404, "EntryNotFound"
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub()
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def write(folder, **settings):
    """Write a tokenizer.json of six words, and the settings files that are named."""
    folder.mkdir(exist_ok=True)
    fast = FastTokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    fast.add_special_tokens(["<pad>", "</s>", "<end>", "<unk>"])
    fast.save(str(folder / "tokenizer.json"))
    names = {"tokenizer": "tokenizer_config.json", "special": "special_tokens_map.json", "model": "config.json"}
    for key, content in settings.items():
        (folder / names[key]).write_text(json.dumps(content))
    return folder


LAYOUTS = [
    {"tokenizer": {"eos_token": "<end>", "pad_token": "a"}},
    {"special": {"eos_token": {"content": "<end>"}, "pad_token": "a"}},
    {"tokenizer": {}, "special": {"eos_token": "<end>"}},
    {"tokenizer": {"eos_token": "</s>"}, "special": {"eos_token": "<end>"}},
    {"tokenizer": {"eos_token": "</s>", "added_tokens_decoder": DECODER}, "special": {"eos_token": "<end>"}},
    {"tokenizer": {"eos_token": {"__type": "AddedToken", "content": "<end>"}, "added_tokens_decoder": DECODER}},
]


@pytest.mark.parametrize("settings", LAYOUTS)
def test_folder_and_hub_give_the_ids_that_transformers_gives(settings, hub, tmp_path):
    folder = hub.files = write(tmp_path / "tokenizer", **settings)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    for name in (str(folder), f"{folder}/tokenizer.json", "someone/tokenizer"):
        found = Tokenizer.load(name)
        assert found.eos_id == reference.eos_token_id
        assert found.pad_id == (reference.pad_token_id if reference.pad_token_id is not None else 0)
    assert Tokenizer.load("someone/tokenizer").fingerprint() == Tokenizer.load(str(folder)).fingerprint()


@pytest.mark.parametrize(
    ("model", "eos_id", "pad_id"),
    [({"eos_token_id": 2, "pad_token_id": 4}, 2, 4), ({"eos_token_id": [2, 1]}, 2, 0), ({"model_type": "t5"}, 1, 0)],
)
def test_the_config_of_the_model_names_the_end_if_no_settings_do(model, eos_id, pad_id, hub, tmp_path):
    hub.files = write(tmp_path / "tokenizer", model=model)  # t5-base on the hub has no tokenizer_config.json
    for name in (str(hub.files), "someone/tokenizer"):
        found = Tokenizer.load(name)
        assert (found.eos_id, found.pad_id) == (eos_id, pad_id)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_requests_to_a_busy_hub_are_retried(file, hub, tmp_path, monkeypatch):
    hub.files = write(tmp_path / "tokenizer", tokenizer={"eos_token": "</s>"}, special={"eos_token": "<end>"})
    no_wait = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", no_wait)
    # The client sends seven requests in each try of ours.
    hub.faults[file] = [(503, "")] * 14
    with pytest.warns(UserWarning, match=rf"tokenizer someone/tokenizer \({file}\): .*try 2 of 3"):
        assert Tokenizer.load("someone/tokenizer", Retry(3, 0.001)).eos_id == 2
    hub.faults["tokenizer.json"] = [(503, "")] * 99
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "other_cache"))
    with (
        pytest.warns(UserWarning, match="try 1 of 1"),
        pytest.raises(InputError, match=r"not be read in 2 tries: .*503"),
    ):
        Tokenizer.load("someone/tokenizer", Retry(1, 0.001))


def test_a_refusal_of_the_hub_is_an_error_at_once(hub, tmp_path):
    hub.files = tmp_path / "empty"
    hub.files.mkdir()
    hub.faults["tokenizer.json"] = [(403, "GatedRepo")]
    with pytest.raises(InputError, match="'someone/tokenizer' is gated: ask for access"):
        Tokenizer.load("someone/tokenizer")
    with pytest.raises(InputError, match=r"someone/tokenizer on the Hugging Face hub has no tokenizer\.json"):
        Tokenizer.load("someone/tokenizer")
    with pytest.raises(InputError, match="nor a repository on the Hugging Face hub that you may read"):
        Tokenizer.load("someone/else")
    with pytest.raises(InputError, match="neither a folder or file here nor the name of a repository"):
        Tokenizer.load("/no/such/folder")
    assert max(hub.requests.values()) == 3


def test_without_a_network_the_cache_is_read_or_an_error_says_that_it_is_empty(hub, tmp_path, monkeypatch):
    hub.files = write(tmp_path / "tokenizer", model={"eos_token_id": 2})
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(InputError, match="nor in the Hugging Face cache, and HF_HUB_OFFLINE is set"):
            Tokenizer.load("someone/tokenizer")
        assert not hub.requests
    Tokenizer.load("someone/tokenizer")
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert Tokenizer.load("someone/tokenizer").eos_id == 2
    assert not hub.requests


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": {"eos_token": "<eos>"}}, "names eos_token '<eos>', which is not in its vocabulary"),
        ({"special": {"pad_token": {"content": "[P]"}}}, r"names pad_token '\[P\]', which is not in its vocabulary"),
        ({"model": {"eos_token_id": 6}}, "has eos_token_id 6, which is not in its vocabulary"),
        ({"tokenizer": {"eos_token": 2}}, "a tokenizer's eos_token is 2; it must be the text of a token"),
        ({"tokenizer": ["</s>"]}, "tokenizer_config\\.json holds a JSON list, not an object"),
    ],
)
def test_wrong_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Tokenizer.load(str(write(tmp_path / "tokenizer", **settings)))


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "tokenizer")
    assert Tokenizer.load("~/tokenizer").eos_id == 1
