"""Run a sample of ``tests/flag_matrix.py``, and compare its cases with those whose verdicts are on record."""

import json

import pytest

from tests.flag_matrix import VERDICTS, all_cases, verdict

RECORDED = json.loads(VERDICTS.read_text())
SAMPLE = [
    "max_steps 50",
    "max_time 00:00:00:02",
    "val_check_interval 00:00:00:02",
    "overfit_batches 1",
    "callbacks EMAWeightAveraging",
    "profiler AdvancedProfiler",
    "logger CSVLogger",
    "model.optimizer Adagrad",
    "model.schedule OneCycleLR",
    "model.schedule ReduceLROnPlateau",
    "plugins MixedPrecision",
    "plugins XLACheckpointIO",
    "plugins LSFEnvironment",
    "callbacks Checkpoints",
    "strategy deepspeed",
    "logger WandbLogger",
    "precision 16-mixed",
]


def test_each_argument_and_class_of_lightning_and_torch_has_been_tried():
    """A class that an upgrade brings is missing from the record, until ``python -m tests.flag_matrix`` has run."""
    assert set(all_cases()) == set(RECORDED)


def test_no_case_ends_in_a_traceback():
    assert set(RECORDED.values()) == {"works", "one line"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_it_works_or_is_refused_in_one_line(name, tmp_path):
    result, said = verdict(all_cases()[name], tmp_path)
    assert result == RECORDED[name], said
