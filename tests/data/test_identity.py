"""Record the data and the tokenizer of a run in its checkpoint, and compare or take them in the run that resumes."""

import json
import re
import shutil

import pytest

from cola_lightning.cli.app import main
from cola_lightning.data import C4DataModule, StreamingDataModule, fingerprints
from cola_lightning.data import identity as identities
from cola_lightning.data.retry import Retry
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from tests.data.changing_data import NamedTokenizer, Streamed, Texts


@pytest.mark.parametrize("case", [Texts], indirect=True, ids=lambda kind: kind.__name__)
def test_other_rows_from_the_same_files_are_refused(case):
    """Another release of a library may give other rows."""
    data, state = case
    state = json.loads(json.dumps(state))
    state["identity"]["ids"] = "0" * 32
    with pytest.raises(InputError, match="the text gives other rows than it gave"):
        data.begin(state)


@pytest.mark.parametrize("case", [Streamed, Texts], indirect=True, ids=lambda kind: kind.__name__)
def test_a_run_does_not_resume_with_another_data_module(case):
    data, state = case
    name = "TextDataModule" if data.module is C4DataModule else "C4DataModule"
    with pytest.raises(InputError, match=rf"--data is {data.module.__name__}, but the run began with {name}"):
        data.module(**data.options).begin_from({name: state}, None, training=True)


@pytest.mark.parametrize("case", [Streamed], indirect=True, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("began", "now"), [(C4DataModule, StreamingDataModule), (StreamingDataModule, C4DataModule)])
def test_c4_and_other_streams_share_their_state(case, began, now):
    """For example, a run begins on C4 and resumes on the same text prepared."""
    data, state = case
    data.module = now
    module = data.begin(checkpoint={began.__name__: state})
    after = module.state_dict()  # the state after one more batch, from the next logical shard
    assert after["batches"] == state["batches"] + 1
    assert after["logical_shards"]["0"] == state["logical_shards"]["0"]
    data.add_file()
    with pytest.raises(InputError, match=r"/a has \d files; it had \d"):
        data.begin(checkpoint={began.__name__: state})


@pytest.mark.parametrize("case", [Streamed, NamedTokenizer], indirect=True, ids=lambda kind: kind.__name__)
def test_the_tokenizer_saved_with_the_run_takes_precedence(case, tmp_path):
    data, state = case
    shutil.copytree(data.folder / "tokenizer", tmp_path / "kept_by_run")
    own = Tokenizer.load(str(tmp_path / "kept_by_run"))
    data.change_the_tokenizer_in_place()
    with pytest.warns(UserWarning, match="was changed since the run began; the run goes on with its own"):
        module = data.begin(state, run_tokenizer=tmp_path / "kept_by_run")
    assert module.tokenizer.fingerprint() == own.fingerprint()
    data.name_another_tokenizer()
    with pytest.raises(InputError, match=r"--data.tokenizer .*/other makes other ids than the tokenizer of the run"):
        data.begin(state, run_tokenizer=tmp_path / "kept_by_run")


@pytest.mark.parametrize("case", [Streamed, Texts], indirect=True, ids=lambda kind: kind.__name__)
def test_evaluation_on_other_text_needs_the_tokenizer_of_the_run(case, tmp_path):
    data, state = case
    data.begin(state).tokenizer.save(tmp_path / "kept_by_run")
    own = Tokenizer.load(str(tmp_path / "kept_by_run"))
    data.add_file()
    module = data.begin(state, stage="validate", run_tokenizer=tmp_path / "kept_by_run")
    assert module.tokenizer.fingerprint() == own.fingerprint()


@pytest.mark.parametrize("case", [Streamed], indirect=True, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("named", "expected"), [(None, ["1" * 40, None, "2" * 40]), ("main", ["main", None, "main"])], ids=["same", "other"]
)
def test_a_run_stays_at_the_commit_of_the_hub_that_it_began_with(case, named, expected):
    """Another revision on the command line takes precedence."""
    data, state = case
    began = json.loads(json.dumps(state))
    began["identity"]["sources"][0]["commit"] = "1" * 40  # the second source is a folder and has no commit
    began["identity"]["validation"]["commit"] = "2" * 40
    data.options["sources"][0].revision = named
    module = data.module(**data.options)
    module.begin_from({"C4DataModule": began}, None, training=True)
    assert [source.revision for source in module.sources.all] == expected
    assert module.retry.started  # so it waits for the hub, unlike a run that begins


@pytest.mark.parametrize(
    ("then", "now", "outcome"),
    [
        ({"commit": "1" * 40}, {"commit": "2" * 40}, "c4 is at commit 2.*; it was at 1.*: set its revision to that"),
        (
            {"commit": "1" * 40},
            {"commit": "2" * 40, "title": "fineweb"},
            "fineweb is read in place of c4, and is another",
        ),
        (
            {"commit": "1" * 40},
            {"place": "a server"},
            "is read from a server, in place of c4 from the hub; only names of",
        ),
        (
            {"place": "a server", "contents": "tag", "sizes": "s"},
            {"place": "this machine's disk", "contents": "hash", "sizes": "s"},
            "is read from this machine's disk, in place of c4 from a server; only names and sizes of",
        ),
        ({"contents": "a", "place": "a server"}, {"contents": "b", "place": "a server"}, "under other tags"),
        ({"commit": "1" * 40}, {"commit": "1" * 40}, None),
        ({"paths": "en"}, {"paths": "de", "title": "c4/de"}, "c4/de is read in place of c4, and is another part of"),
        ({"contents": "a"}, {"contents": "b"}, "the files of c4 have other contents"),
    ],
)
def test_sources_of_the_hub_and_of_servers_are_compared_by_what_is_known_of_both(then, now, outcome):
    common = {"title": "c4", "column": "text", "place": "the hub", "commit": None, "files": 1, "names": "n"}
    common |= {"paths": None, "bytes": None, "sizes": None, "contents": None, "prepared": None}
    problem, note = identities.compare_sources(common | then, common | now)
    refused = any(word in (outcome or "") for word in ("another", "set its revision", "other contents"))
    assert (problem is not None) == refused
    assert re.search(outcome, problem or note) if outcome else note is None


@pytest.mark.parametrize("case", [NamedTokenizer], indirect=True, ids=lambda kind: kind.__name__)
def test_a_model_is_evaluated_on_data_of_another_kind_with_its_own_tokenizer(case, begun):
    data, _ = case
    streamed, state = begun(Streamed)
    checkpoint = {"C4DataModule": state}
    ids = Tokenizer.load(str(streamed.folder / "tokenizer")).fingerprint()
    data.options["tokenizer"] = str(streamed.folder / "other")
    with pytest.raises(InputError, match=r"--data\.tokenizer .*/other makes other ids than the tokenizer of the run"):
        data.begin(checkpoint=checkpoint, stage="validate", run_tokenizer=streamed.folder / "tokenizer")
    with pytest.raises(InputError, match=r"the tokenizer \(.*/other\) makes other ids than the one of the run"):
        data.begin(checkpoint=checkpoint, stage="validate")
    data.options["tokenizer"] = None
    module = data.begin(checkpoint=checkpoint, stage="validate", run_tokenizer=streamed.folder / "tokenizer")
    assert module.tokenizer.fingerprint() == ids


@pytest.mark.parametrize("case", [Streamed, Texts], indirect=True, ids=lambda kind: kind.__name__)
def test_ranks_on_nodes_with_different_files_do_not_start(case, monkeypatch):
    data, _ = case
    first = []

    def two_ranks(content):
        first.append(content)
        return [first[0], first[-1]]

    monkeypatch.setattr("cola_lightning.data.token_data_module.tell_all", two_ranks)
    data.begin()
    data.add_file()
    with pytest.raises(InputError, match="ranks 1 have other data or another tokenizer than rank 0"):
        data.begin()


@pytest.mark.slow
def test_the_command_line_refuses_added_text_and_does_not_change_the_run(corpus, tiny_run, tmp_path, capsys):
    shutil.copytree(corpus, tmp_path / "text")
    flags = [*tiny_run, f"--data.paths=['{tmp_path}/text']", f"--run_dir={tmp_path}/run", "--trainer.max_steps=3"]
    main(["fit", *flags])
    kept = {file: file.read_bytes() for file in (tmp_path / "run" / "tokenizer").iterdir()}
    (tmp_path / "text" / "new.txt").write_text("quite another text " * 200)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *flags, "--ckpt_path=last", "--trainer.max_steps=6"])
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "the data is not what the run began with" in line
    assert "text has 41 files; it had 40" in line
    assert {file: file.read_bytes() for file in kept} == kept


def test_large_files_are_hashed_in_samples_that_include_their_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "READ_WHOLE", 1000)
    file = tmp_path / "a.bin"
    content = bytearray(1_000_000)
    found = set()
    for place in (None, 0, -1, len(content) // 2):
        if place is not None:
            content[place] ^= 1
        file.write_bytes(content)
        fingerprints._of_disk.cache_clear()
        found.add(fingerprints.fingerprint_files([str(file)], Retry())[0])
    assert len(found) == 4
