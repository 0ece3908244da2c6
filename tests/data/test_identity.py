"""Changes of the data under a checkpoint: each is refused in one line, or accepted with a message."""

import json
import re
import shutil

import pytest

from cola_lightning.cli.app import main
from cola_lightning.data import C4DataModule, Source, StreamingDataModule, TextDataModule
from cola_lightning.data import identity as identities
from cola_lightning.data.prepare import prepare
from cola_lightning.data.retry import Retry
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from tests.data.conftest import fake_trainer, sentences, write_shard


class Streamed:
    """Mixture that is streamed from two folders of shards."""

    module = C4DataModule

    def __init__(self, folder):
        self.folder, self.text = folder, folder / "text"
        for name, shards in (("a", 3), ("b", 2)):
            (self.text / name).mkdir(parents=True)
            for number in range(shards):
                write_shard(self.text / name / f"train-{number}.json.gz", sentences(f"{name}{number}", 20))
        write_shard(self.text / "a" / "validation.json.gz", sentences("v", 20))
        Tokenizer.train(["a few words"], 300).save(folder / "tokenizer")
        Tokenizer.train(["some other words"], 290).save(folder / "other")
        self.options = {
            "sources": [Source(str(self.text / "a"), weight=0.75), Source(str(self.text / "b"), weight=0.25)],
            "tokenizer": str(folder / "tokenizer"),
            "sequence_length": 32,
            "batch_size": 2,
            "num_logical_shards": 2,
            "shuffle_buffer": 8,
            "validation_tokens": 200,
            "num_workers": 0,
            "cache_dir": str(folder / "cache"),
        }

    def begin(self, state=None, stage="fit", run_tokenizer=None, checkpoint=None):
        """Set the data module up as the command line and Lightning do."""
        data = self.module(**self.options)
        data.trainer = fake_trainer()
        if state or checkpoint:
            data.begin_from(checkpoint or {self.module.__name__: state}, run_tokenizer, stage == "fit")
        data.prepare_data()
        data.setup(stage)
        if state:
            data.load_state_dict(state)
        if stage == "fit":
            next(iter(data.train_dataloader()))
        return data

    # Changes of the data. CHANGES lists each with the expected message.

    def change(self, options):
        self.options |= options

    def add_file(self, file=None):
        shutil.copy(file or self.text / "a" / "train-1.json.gz", self.text / "a" / "train-9.json.gz")

    def rename_file(self):
        (self.text / "a" / "train-1.json.gz").rename(self.text / "a" / "train-7.json.gz")

    def replace_files(self):
        for number in range(3):
            write_shard(self.text / "a" / f"train-{number}.json.gz", sentences(f"other{number}", 21))

    def edit_file(self):
        file = next((self.text / "a").glob("*1*"))
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)

    def cut_file(self):
        file = next((self.text / "a").glob("*1*"))
        file.write_bytes(file.read_bytes()[:-9])

    def rename_column(self):
        self.options["sources"][0].text_column = "url"

    def swap_sources(self):
        self.options["validation"] = Source(self.options["sources"][0].path, split="validation")
        self.options["sources"].reverse()

    def change_weights(self):
        for source, weight in zip(self.options["sources"], (0.5, 0.5), strict=True):
            source.weight = weight

    def take_one_source_out(self):
        self.options["sources"] = [Source(str(self.text / "a"))]
        self.options["validation"] = Source(str(self.text / "a"), split="validation")

    def change_validation_text(self):
        write_shard(self.text / "a" / "validation.json.gz", sentences("w", 20))

    def name_another_tokenizer(self):
        self.options["tokenizer"] = str(self.folder / "other")

    def change_the_tokenizer_in_place(self):
        shutil.copytree(self.folder / "other", self.folder / "tokenizer", dirs_exist_ok=True)

    def move(self):
        self.text = self.text.rename(self.folder / "moved")
        for source, name in zip(self.options["sources"], "ab", strict=True):
            source.path = str(self.text / name)


class Prepared(Streamed):
    """Prepared folders of the same text."""

    def __init__(self, folder):
        super().__init__(folder)
        self.make()
        self.options["tokenizer"] = None

    def make(self, tokenizer="tokenizer", folder=None):
        for name, splits in (("a", ["validation", "train"]), ("b", ["train"])):
            target = (folder or self.folder / "prepared") / name
            prepare(Source(str(self.text / name)), str(target), splits, str(self.folder / tokenizer), num_workers=1)
        for source, name in zip(self.options["sources"], "ab", strict=True):
            source.path = str((folder or self.folder / "prepared") / name)

    def _anew(self):
        shutil.rmtree(self.folder / "prepared")
        self.make()

    def add_file(self):
        super().add_file()
        self._anew()

    def rename_file(self):
        super().rename_file()
        self._anew()

    def replace_files(self):
        super().replace_files()
        self.make()  # tokenizes the changed shards again

    def cut_file(self):
        file = self.folder / "prepared" / "a" / "train" / "00001.ids.bin"
        file.write_bytes(file.read_bytes()[:-2])

    def edit_file(self):
        file = self.folder / "prepared" / "a" / "train" / "00001.ids.bin"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)

    def change_validation_text(self):
        super().change_validation_text()
        self.make()

    def prepare_with_another_tokenizer(self):
        self.make("other", self.folder / "prepared_anew")

    def stream(self):
        self.options["tokenizer"] = str(self.folder / "tokenizer")
        for source, name in zip(self.options["sources"], "ab", strict=True):
            source.path = str(self.text / name)

    def move(self):
        (self.folder / "prepared").rename(self.folder / "moved")
        for source, name in zip(self.options["sources"], "ab", strict=True):
            source.path = str(self.folder / "moved" / name)

    def take_one_source_out(self):
        path = str(self.folder / "prepared" / "a")
        self.options |= {"sources": [Source(path)], "validation": Source(path, split="validation")}


class Texts(Streamed):
    """Folder of text files, with a BPE that is trained on them."""

    module = TextDataModule

    def __init__(self, folder):
        self.folder, self.text = folder, folder / "text"
        (self.text / "a").mkdir(parents=True)
        for number in range(6):
            rows = ({"text": text, "url": "http://x"} for text in sentences(f"a{number}", 20))
            (self.text / "a" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Tokenizer.train(["a few words"], 300).save(folder / "tokenizer")
        Tokenizer.train(["some other words"], 290).save(folder / "other")
        self.options = {
            "paths": [str(self.text / "a")],
            "vocab_size": 300,
            "sequence_length": 32,
            "batch_size": 2,
            "cache_dir": str(folder / "cache"),
        }

    def add_file(self):
        shutil.copy(self.text / "a" / "1.jsonl", self.text / "a" / "9.jsonl")

    def rename_file(self):
        (self.text / "a" / "1.jsonl").rename(self.text / "a" / "7.jsonl")

    def edit_file(self):
        file = self.text / "a" / "1.jsonl"
        file.write_text(file.read_text().replace("congress", "Congress"))

    def name_another_folder(self):
        shutil.copytree(self.text / "a", self.text / "b")
        (self.text / "b" / "1.jsonl").write_text((self.text / "b" / "1.jsonl").read_text().replace("war", "law"))
        self.options["paths"] = [str(self.text / "b")]

    def name_a_second_folder(self):
        shutil.copytree(self.text / "a", self.text / "b")
        self.options["paths"] = [*self.options["paths"], str(self.text / "b")]

    def move(self):
        self.text = self.text.rename(self.folder / "moved")
        self.options["paths"] = [str(self.text / "a")]


class NamedTokenizer(Texts):
    """Folder of text files, with a named tokenizer and separate validation files."""

    def __init__(self, folder):
        super().__init__(folder)
        (folder / "held_out.jsonl").write_text(json.dumps({"text": "the law of the land"}) + "\n")
        self.options |= {
            "tokenizer": str(folder / "tokenizer"),
            "validation_paths": [str(folder / "held_out.jsonl")],
        }

    def change_validation_text(self):
        (self.folder / "held_out.jsonl").write_text(json.dumps({"text": "the law of the sea"}) + "\n")


SETTING = r"--data\.{} is {}; it was {}"
COMMON = [
    ("add_file", "refused", r"/a has \d files; it had \d"),
    ("rename_file", "refused", r"the files of .*/a have other names, or another order"),
    ("move", "said", r"moved/a is read in place of .*/a; its files are the same"),
    ({"seed": 7}, "refused", SETTING.format("seed", 7, 42)),
]
C4_CHANGES = [
    *COMMON,
    ("replace_files", "refused", r"the files of .*/a hold [\d,]+ bytes; they held [\d,]+"),
    ("swap_sources", "refused", "the sources are named in another order; it was .*/a, .*/b"),
    ("take_one_source_out", "refused", "1 sources are named; there were 2"),
    ("change_weights", "refused", r"the weight of .*/a is 0\.5; it was 0\.75"),
    ({"num_logical_shards": 4}, "refused", SETTING.format("num_logical_shards", 4, 2)),
    ({"shuffle_buffer": 9}, "refused", SETTING.format("shuffle_buffer", 9, 8)),
    ({"rows": "packed"}, "refused", SETTING.format("rows", "packed", "padded")),
    ({"sequence_length": 16}, "said", SETTING.format("sequence_length", 16, 32)),
    ({"validation_tokens": 100}, "said", SETTING.format("validation_tokens", 100, 200)),
]
TEXT_CHANGES = [
    *COMMON,
    ("edit_file", "refused", "the files of .*/a have other contents"),
    ("cut_file", "refused", r"the files of .*/a hold [\d,]+ bytes; they held [\d,]+"),
    ("name_another_folder", "refused", "the files of .*/b have other contents"),
    ("name_a_second_folder", "refused", r"/a, .*/b has 12 files; it had 6"),
    ({"text_column": "url"}, "refused", "text_column of .*/a is 'url'; it was 'text'"),
    ({"rows": "padded"}, "refused", SETTING.format("rows", "padded", "packed")),
    ({"sequence_length": 16}, "refused", SETTING.format("sequence_length", 16, 32)),
    ({"separator": "the"}, "refused", SETTING.format("separator", "the", "null")),
]
CHANGES = {
    Streamed: [
        *C4_CHANGES,
        ("edit_file", "refused", "the files of .*/a have other contents"),
        ("cut_file", "refused", r"the files of .*/a hold [\d,]+ bytes; they held [\d,]+"),
        ("rename_column", "refused", "text_column of .*/a is 'url'; it was 'text'"),
        ("change_validation_text", "said", r"of the validation text, the files of .*/a hold .*may not be comparable"),
        ("name_another_tokenizer", "refused", r"the tokenizer \(.*/other\) makes other ids than .*/tokenizer\)"),
        ("change_the_tokenizer_in_place", "refused", r"the tokenizer \(.*/tokenizer\) makes other ids than"),
    ],
    Prepared: [
        *C4_CHANGES,
        ("cut_file", "refused", r"00001\.ids\.bin has [\d,]+ bytes, not [\d,]+"),
        ("edit_file", "refused", r"00001\.ids\.bin is corrupted: its SHA-256 is"),
        ("change_validation_text", "said", r"of the validation text, .*may not be comparable"),
        ("prepare_with_another_tokenizer", "refused", "the tokenizer .* makes other ids than"),
        ("name_another_tokenizer", "refused", "was prepared with another tokenizer than"),
        ("stream", "said", r"text/a is read in place of .*prepared/a; its files are the same"),
    ],
    Texts: [
        *TEXT_CHANGES,
        ({"vocab_size": 290}, "refused", SETTING.format("vocab_size", 290, 300)),
        ({"validation_fraction": 0.5}, "refused", SETTING.format("validation_fraction", 0.5, 0.05)),
        ("name_another_tokenizer", "refused", r"the tokenizer \(.*/other\) makes other ids than .*trained on the text"),
    ],
    NamedTokenizer: [
        *TEXT_CHANGES,
        ("change_validation_text", "said", r"of the validation text, the files of .*may not be comparable"),
        ("name_another_tokenizer", "refused", r"the tokenizer \(.*/other\) makes other ids than .*/tokenizer\)"),
        ("change_the_tokenizer_in_place", "refused", r"the tokenizer \(.*/tokenizer\) makes other ids than"),
    ],
}
CASES = [(kind, *case) for kind, cases in CHANGES.items() for case in cases]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Make each kind of data once, with the state of a run on it."""
    made = {}
    for kind in CHANGES:
        data = kind(tmp_path_factory.mktemp(kind.__name__))
        made[kind] = data, json.loads(json.dumps(data.begin().state_dict()))
    return made


@pytest.fixture
def case(begun, tmp_path, request):
    """Yield one kind of data at its original paths, and the state of its run; restore the data after the test."""
    kind = request.param
    data, state = begun[kind]
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "change", "outcome", "message"),
    CASES,
    ids=[f"{kind.__name__}-{change if isinstance(change, str) else next(iter(change))}" for kind, change, *_ in CASES],
    indirect=["case"],
)
def test_a_change_under_a_checkpoint(case, change, outcome, message):
    data, state = case
    getattr(data, change)() if isinstance(change, str) else data.change(change)
    if outcome == "refused":
        with pytest.raises(InputError, match=message) as error:
            data.begin(state)
        assert "\n" not in str(error.value)
        assert not str(error.value).startswith("[")
    else:
        with pytest.warns(UserWarning, match=message):
            data.begin(state)


@pytest.mark.parametrize("case", CHANGES, indirect=True, ids=lambda kind: kind.__name__)
def test_no_change_gives_no_message(case, recwarn):
    data, state = case
    data.begin(state)
    assert not [warning for warning in recwarn if "since the run began" in str(warning.message)]


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


@pytest.mark.parametrize("case", CHANGES, indirect=True, ids=lambda kind: kind.__name__)
def test_a_change_is_refused_if_the_state_is_loaded_after_setup(case):
    data, state = case
    data.add_file()
    module = data.begin()
    with pytest.raises(InputError, match=r"/a has \d files; it had \d"):
        module.load_state_dict(state)


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
    assert [source.revision for source in [*module.sources, module.validation]] == expected


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
def test_sources_of_the_hub_and_of_servers(then, now, outcome):
    common = {"title": "c4", "column": "text", "place": "the hub", "commit": None, "files": 1, "names": "n"}
    common |= {"paths": None, "bytes": None, "sizes": None, "contents": None, "prepared": None}
    problem, note = identities.compare_sources(common | then, common | now)
    refused = any(word in (outcome or "") for word in ("another", "set its revision", "other contents"))
    assert (problem is not None) == refused
    assert re.search(outcome, problem or note) if outcome else note is None


@pytest.mark.parametrize("case", [NamedTokenizer], indirect=True, ids=lambda kind: kind.__name__)
def test_a_model_is_evaluated_on_data_of_another_kind_with_its_own_tokenizer(case, begun):
    data, _ = case
    streamed, state = begun[Streamed]
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
    monkeypatch.setattr(identities, "READ_WHOLE", 1000)
    file = tmp_path / "a.bin"
    content = bytearray(1_000_000)
    found = set()
    for place in (None, 0, -1, len(content) // 2):
        if place is not None:
            content[place] ^= 1
        file.write_bytes(content)
        identities._of_disk.cache_clear()
        found.add(identities.fingerprint_files([str(file)], Retry())[0])
    assert len(found) == 4
