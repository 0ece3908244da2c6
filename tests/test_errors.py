import warnings

import pytest

from cola_lightning.data.retry import Retry
from cola_lightning.data.sources import Source, TextCorpus
from cola_lightning.errors import InputError, hide_secrets
from tests.data.server import Server


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host.org/a.json line 3", "https://***@host.org/a.json line 3"),
        ("'ftp://me:p@ss@host/a' and http://token@b/c", "'ftp://***@host/a' and http://***@b/c"),
        ("https://h/a?X-Amz-Signature=abc%2F&part=1&sig=x", "https://h/a?X-Amz-Signature=***&part=1&sig=***"),
        ("https://h/a?api_key=1#x", "https://h/a?api_key=***#x"),
        (
            "hf://datasets/allenai/c4@1588ec/en/c4-train.json.gz?n=2",
            "hf://datasets/allenai/c4@1588ec/en/c4-train.json.gz?n=2",
        ),
        ("mail me@host.org; a://b", "mail me@host.org; a://b"),
    ],
)
def test_secrets_in_addresses_are_hidden_and_nothing_else(text, shown):
    assert hide_secrets(text) == shown
    assert str(InputError(text)) == shown


def test_a_password_in_the_address_of_data_is_not_printed(tmp_path):
    (tmp_path / "train.json").write_text('{"text": "a"}\nnot json\n')
    server = Server(tmp_path)
    server.faults["train.json"] = [503, 503]
    address = server.url.replace("://", "://me:hunter2@") + "/train.json"
    assert "hunter2" not in Source(address).title
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        corpus = TextCorpus(Source("json", data_files=address), None, Retry(3, 0.001))
        with pytest.raises(InputError, match="line at byte 14 is not JSON") as error:
            list(corpus.read(0))
    server.close()
    assert "***@127.0.0.1" in str(error.value)
    assert "hunter2" not in str(error.value) + "".join(str(warning.message) for warning in said)
    assert said
