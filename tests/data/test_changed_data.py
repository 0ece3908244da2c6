"""Each change of the data under a checkpoint is refused in one line, or accepted with a message."""

import pytest

from cola_lightning.errors import InputError
from tests.data.changing_data import NamedTokenizer, Prepared, Streamed, Texts

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "change", "outcome", "message"),
    CASES,
    ids=[f"{kind.__name__}-{change if isinstance(change, str) else next(iter(change))}" for kind, change, *_ in CASES],
    indirect=["case"],
)
def test_a_change_of_the_data_is_refused_or_reported_when_a_run_resumes(case, change, outcome, message):
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


@pytest.mark.parametrize("case", CHANGES, indirect=True, ids=lambda kind: kind.__name__)
def test_a_change_is_refused_if_the_state_is_loaded_after_setup(case):
    data, state = case
    data.add_file()
    module = data.begin()
    with pytest.raises(InputError, match=r"/a has \d files; it had \d"):
        module.load_state_dict(state)
