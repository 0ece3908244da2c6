"""Refuse numbers that no run can have: NaN, settings of a network out of range, and sizes beyond any memory."""

import re
from functools import partial

import pytest

from cola_lightning import host_memory
from cola_lightning.cli.app import main
from cola_lightning.cli.options import OptionParser
from cola_lightning.cli.trainer_flags import check_numbers
from cola_lightning.data import C4DataModule, TextDataModule
from cola_lightning.errors import InputError
from cola_lightning.models import LlamaConfig

network = partial(
    LlamaConfig, vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
)
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        *(("rope_theta", value, "it must be a number above 1") for value in (0, -1, 1, NAN, INFINITY)),
        *(("rms_norm_eps", value, "it must be a number of at least 0") for value in (-1, NAN, INFINITY)),
        *((size, 10**11, "1,000,000,000 is the most") for size in ("vocab_size", "hidden_size", "num_hidden_layers")),
    ],
)
def test_settings_of_a_network_out_of_range_are_refused(name, value, wanted):
    """Such a network would train, with equal rotary positions or with NaN."""
    with pytest.raises(InputError, match=re.escape(f"{name} is {value}; {wanted}")):
        network(**{name: value})


def test_a_network_may_have_the_settings_at_the_edge_of_the_range():
    network(rope_theta=1.5, rms_norm_eps=0)


def test_the_nearest_divisor_of_a_large_size_is_found_at_once():
    with pytest.raises(InputError, match=r"num_attention_heads 7 does not divide hidden_size 900000000; .* instance 6"):
        network(hidden_size=900_000_000, num_attention_heads=7)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"model": {"optimizer": {"init_args": {"lr": NAN}}}},
            "--model.optimizer.lr is nan; it must be a finite number",
        ),
        ({"model": {"optimizer": {"init_args": {"betas": [0.9, INFINITY]}}}}, "--model.optimizer.betas.1 is inf"),
        ({"data": {"init_args": {"validation_fraction": NAN}}}, "--data.validation_fraction is nan"),
        ({"trainer": {"gradient_clip_val": NAN}}, "--trainer.gradient_clip_val is nan"),
        ({"trainer": {"max_steps": 10**30}}, f"--trainer.max_steps is {10**30}; it must be below 2^63"),
    ],
)
def test_settings_that_are_not_finite_numbers_are_refused(settings, said):
    with pytest.raises(InputError, match=re.escape(said)):
        check_numbers(settings)


def test_a_limit_may_be_infinite():
    check_numbers({"trainer": {"callbacks": [{"init_args": {"stopping_threshold": INFINITY}}]}})


def test_an_option_of_more_than_64_bits_is_refused():
    parser = OptionParser("generate")
    parser.add_argument("--max_new_tokens", type=int)
    with pytest.raises(InputError, match=rf"--max_new_tokens: {10**30} is too large; it must be below 2\^63"):
        parser.parse_args(["--max_new_tokens", str(10**30)])


# -- memory -----------------------------------------------------------------------------------------------------------

TEXT, STREAM = partial(TextDataModule, ["corpus"]), partial(C4DataModule, "corpus")
TOO_LARGE = [
    (TEXT, {"sequence_length": 10**11}, "a batch of --data.batch_size 16 rows of --data.sequence_length 100000000000"),
    (TEXT, {"batch_size": 10**11}, "a batch of --data.batch_size 100000000000 rows of"),
    (TEXT, {"vocab_size": 10**11}, "a tokenizer of --data.vocab_size 100000000000"),
    (TEXT, {"num_workers": 10**6}, "--data.num_workers 1000000"),
    (
        STREAM,
        {"sequence_length": 10**11},
        "a batch of --data.batch_size 16 rows of --data.sequence_length 100000000000",
    ),
    (STREAM, {"batch_size": 10**11}, "a batch of --data.batch_size 100000000000 rows of"),
    (STREAM, {"num_workers": 10**6}, "--data.num_workers 1000000"),
    (STREAM, {"num_logical_shards": 10**11}, "--data.num_logical_shards 100000000000"),
]


@pytest.mark.parametrize("module", [TEXT, STREAM])
def test_fewer_than_no_workers_are_refused(module):
    with pytest.raises(InputError, match="num_workers is -1; it must be at least 0"):
        module(num_workers=-1)


@pytest.mark.parametrize(("module", "options", "said"), TOO_LARGE)
def test_data_that_does_not_fit_into_memory_is_refused_before_reading(module, options, said, monkeypatch):
    monkeypatch.setattr(host_memory, "memory_of_machine", lambda: 2.0**40)
    with pytest.raises(
        InputError, match=rf"{re.escape(said)} .*would take [\d,]+ GiB of memory; this machine has 1,024 GiB"
    ):
        module(**options)


def test_micro_batches_of_a_step_are_counted_together(tiny_run, tmp_path, capsys):
    command = ["fit", *tiny_run, "--trainer.accumulate_grad_batches=10000000000", f"--run_dir={tmp_path}"]
    with pytest.raises(SystemExit):
        main(command)
    assert "times --trainer.accumulate_grad_batches 10000000000 would take" in capsys.readouterr().err


def test_a_network_that_does_not_fit_into_memory_is_refused(tiny_run, tmp_path, capsys):
    command = ["fit", *tiny_run, "--model.vocab_size=1000000000", "--model.hidden_size=1024", f"--run_dir={tmp_path}"]
    with pytest.raises(SystemExit):
        main(command)
    assert "error: its weights would take" in capsys.readouterr().err
