"""Refuse in one line data that was read from a file and has another type than it was written in."""

import json
import re
from typing import NotRequired

import pytest
from typing_extensions import TypedDict

from cola_lightning.checkpoints.formats import tokens_of
from cola_lightning.compare import outcome
from cola_lightning.data import C4DataModule, TextDataModule
from cola_lightning.data.prepared import FORMAT, PreparedCorpus
from cola_lightning.data.sources import Source
from cola_lightning.errors import InputError
from cola_lightning.hub import card
from cola_lightning.provenance import read_provenance
from cola_lightning.stored_data import Count, StoredDataError, check_stored, shape_of


class Inner(TypedDict):
    name: str | None
    steps: list[Count]


class Outer(TypedDict):
    inner: Inner
    rate: float
    flag: NotRequired[bool]


GOOD = {"inner": {"name": None, "steps": [1, 2]}, "rate": 1, "more": object()}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"rate": 1.0}, "FILE holds no inner; REMEDY"),
        ({**GOOD, "inner": {"name": "x"}}, "FILE holds no inner.steps; REMEDY"),
        (
            {**GOOD, "inner": {"name": 3, "steps": []}},
            "FILE sets inner.name to 3, which should be a valid string; REMEDY",
        ),
        ({**GOOD, "inner": {"name": "", "steps": [1, "os.system"]}}, "FILE sets inner.steps.1 to 'os.system', which"),
        ({**GOOD, "inner": {"name": "", "steps": [-1]}}, "FILE sets inner.steps.0 to -1, which should be greater than"),
        ({**GOOD, "inner": {"name": "", "steps": [10**30]}}, f"FILE sets inner.steps.0 to {10**30}, which should be"),
        (
            {**GOOD, "inner": {"name": "", "steps": [True]}},
            "FILE sets inner.steps.0 to True, which should be a valid int",
        ),
        ({**GOOD, "flag": "yes"}, "FILE sets flag to 'yes', which should be a valid boolean; REMEDY"),
        ({**GOOD, "rate": "x" * 500}, f"FILE sets rate to '{'x' * 79} …, which should be a valid number"),
        ([], "FILE holds [], which should be a valid dictionary; REMEDY"),
        (None, "FILE holds None, which should be a valid dictionary; REMEDY"),
    ],
)
def test_the_first_value_of_another_type_is_named_with_its_place(content, said):
    with pytest.raises(StoredDataError, match=re.escape(said)) as caught:
        check_stored(content, Outer, "FILE", "REMEDY")
    assert "\n" not in str(caught.value)


def test_data_of_the_type_is_accepted_with_further_keys():
    check_stored(GOOD, Outer, "FILE", "REMEDY")


def test_the_type_of_an_example_accepts_it_and_refuses_others():
    example = {"a.b": {"done": 3, "best": None, "list": [1]}, "on": True, "rate": 0.5}
    check_stored(example, shape_of(example), "FILE", "REMEDY")
    for change in ({"on": 1}, {"a.b": {"done": "x", "best": None, "list": []}}, {"rate": "x"}):
        with pytest.raises(StoredDataError, match="which should be a valid"):
            check_stored(example | change, shape_of(example), "FILE", "REMEDY")


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"subjects": []}', '{"subjects": ["x"]}'])
def test_a_damaged_file_of_a_comparison_is_reported_in_one_line(tmp_path, content):
    (tmp_path / "costs.json").write_text(content)
    with pytest.raises(InputError, match=r"costs.json .*; delete the file, and it is made again$"):
        outcome.read(tmp_path / "costs.json", outcome.StoredCosts)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"libraries": {"torch": 2}}', '{"data": []}', '{"data": {"sources": [{"title": "x"}]}}'],
)
def test_a_damaged_file_of_a_run_is_reported_in_one_line(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run.json .*remove"):
        read_provenance(tmp_path)


@pytest.mark.parametrize(
    "arguments", [3, {"sources": ["x"]}, {"sources": {"a": 1}}, {"sequence_length": "x"}, {"path": {"a": 1}}]
)
def test_a_card_ignores_the_arguments_of_a_users_data_module(arguments):
    assert card._data({"class_path": "mine.Data", "init_args": arguments}, {}) == card.NOT_KNOWN


@pytest.mark.parametrize("callbacks", [None, [], {"Throughput": 3}, {"Throughput": {"tokens": "x"}}, {3: 4}])
def test_invalid_counts_of_tokens_are_ignored(callbacks):
    assert tokens_of({"callbacks": callbacks}) is None


def test_an_index_of_a_prepared_corpus_is_checked(tmp_path):
    index = {"format": FORMAT, "identity": SOURCE, "tokenizer": "0", "tokenizer_name": None, "dtype": "<u2"}
    index |= {"documents": 1, "tokens": 1, "shards": [{"source": "a", "files": []}]}
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index.json holds no shards.0.fingerprint; delete it, and"):
        PreparedCorpus(Source(str(tmp_path), split="train"))


# -- states of data modules -------------------------------------------------------------------------------------------

SOURCE = dict.fromkeys(["commit", "paths", "bytes", "sizes", "contents", "prepared"]) | {
    "title": "corpus", "column": "text", "place": "a server", "files": 1, "names": "",
}  # fmt: skip
IDENTITY = {
    "fixed": {},
    "free": {},
    "tokenizer": {"name": None, "fingerprint": "0"},
    "sources": [SOURCE],
    "validation": SOURCE,
}
READER = {"pass": 0, "unit": 0, "row": 0, "taken": 0, "through": 0}
LOGICAL_SHARD = {"readers": [READER], "documents": [0], "tokens": [0], "held_out": [0], "rest": None}
ASSIGNMENT = {"at": 0, "replicas": 1, "workers": 1, "jointly": True, "began": 0, "always": True, "passes": 0}
STATES = {
    TextDataModule: {"position": 0, "identity": IDENTITY},
    C4DataModule: {
        "batches": 0,
        "assignment": ASSIGNMENT,
        "logical_shards": {"0": LOGICAL_SHARD},
        "identity": IDENTITY,
    },
}


def places(tree, path=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [place for key, each in items for place in places(each, (*path, key))]


def changed(tree, path, value):
    """Return a copy with another value at a place, or without the key if the value is ``...``."""
    key, *below = path
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if below:
        copy[key] = changed(tree[key], below, value)
    elif value is ...:
        del copy[key]
    else:
        copy[key] = value
    return copy


def data_module(kind, folder):
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("a")
    return kind([str(folder / "corpus")]) if kind is TextDataModule else kind(str(folder / "corpus"))


@pytest.mark.parametrize("kind", STATES, ids=lambda kind: kind.__name__)
def test_an_altered_state_of_a_data_module_is_refused(kind, tmp_path):
    """Each value in turn is replaced by a set, which is never valid, and each required key is left out."""
    module, state = data_module(kind, tmp_path), STATES[kind]
    for place in places(state):
        name = ".".join(map(str, place))
        with pytest.raises(InputError, match=rf"FILE in {kind.__name__} (sets|holds) .*{re.escape(name)}"):
            module.begin_from({kind.__name__: changed(state, place, {1, 2})}, None, training=True, path="FILE")
        if not isinstance(place[-1], int) and place[-1] not in ("sources", "validation", "0", "identity"):
            with pytest.raises(
                InputError, match=rf"FILE in {kind.__name__} holds no {re.escape(name)}; it was altered"
            ):
                module.begin_from({kind.__name__: changed(state, place, ...)}, None, training=True, path="FILE")
