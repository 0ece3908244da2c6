"""What a run leaves in TensorBoard beside curves, through the command line."""

import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from cola_lightning.callbacks.dashboard import LAYOUT
from cola_lightning.callbacks.hyper_parameters import METRICS
from cola_lightning.cli.app import main
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def board(tiny_run, tmp_path_factory):
    """Return the events of a run with everything that configs/monitor.yaml switches on."""
    run_dir = tmp_path_factory.mktemp("run")
    flags = [*tiny_run, "--trainer.callbacks+=CoLAM", "--trainer.callbacks+=ActivationSpectrum",
             "--trainer.callbacks.every_n_steps=3"]  # fmt: skip
    main(["fit", f"--config={REPOSITORY / 'configs' / 'monitor.yaml'}", *flags, f"--run_dir={run_dir}"])
    return EventAccumulator(str(run_dir)).Reload()


def test_the_layout_names_tags_that_a_run_has(board):
    (event,) = board.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT)
    tags = board.Tags()["scalars"]
    not_on_a_cpu = {"train/mfu", "train/hfu"}
    for category in layout.category:
        for chart in category.chart:
            for pattern in chart.multiline.tag:
                assert pattern in not_on_a_cpu or [tag for tag in tags if re.fullmatch(pattern, tag)], pattern


def hparams_data(board, tag):
    content = board.SummaryMetadata(tag).plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


def test_the_hparams_tab_lists_the_run_under_readable_names(board):
    values = dict(hparams_data(board, "_hparams_/session_start_info").session_start_info.hparams)
    numbers = {
        "hidden_size": 32, "num_hidden_layers": 2, "projection.rank": 8, "optimizer.lr": 0.001, "max_steps": 6,
        "batch_size": 4, "sequence_length": 32, "schedule.warmup_steps": 2, "world_size": 1,
    }  # fmt: skip
    words = {"projection": "CoLA", "optimizer": "AdamW", "schedule": "WarmupCosine", "precision": "32-true",
             "callbacks": "CoLAM", "compile": "false", "data": "Text", "strategy": "SingleDevice"}  # fmt: skip
    assert {name: values[name].number_value for name in numbers} == pytest.approx(numbers)
    assert {name: values[name].string_value for name in words} == words
    assert not [name for name in values if "class_path" in name or "init_args" in name or name.startswith("_")]
    experiment = hparams_data(board, "_hparams_/experiment").experiment
    assert {info.name.tag for info in experiment.metric_infos} == set(METRICS) <= set(board.Tags()["scalars"])
    assert {info.name for info in experiment.hparam_infos} == set(values)
    assert hparams_data(board, "_hparams_/session_end_info").session_end_info.status  # success; 0 would be unknown


def test_the_best_perplexity_is_the_least_so_far(board):
    values = [event.value for event in board.Scalars("val/perplexity")]
    best = [event.value for event in board.Scalars("val/perplexity_best")]
    assert best == pytest.approx(torch.tensor(values).cummin(0).values.tolist())
    assert [event.step for event in board.Scalars("val/perplexity_best")] == [
        event.step for event in board.Scalars("val/perplexity")
    ]
