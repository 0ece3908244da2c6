"""Run a sample of ``tests/flag_matrix.py``: each flag of Lightning works or is refused in one line."""

import pytest

from tests.flag_matrix import all_cases, verdict

SAMPLE = {
    "max_steps 50": "works",
    "max_time 00:00:00:02": "works",
    "val_check_interval 00:00:00:02": "works",
    "overfit_batches 1": "one line",
    "callbacks EMAWeightAveraging": "works",
    "profiler AdvancedProfiler": "works",
    "logger CSVLogger": "works",
    "model.optimizer Adagrad": "works",
    "model.schedule OneCycleLR": "works",
    "model.schedule ReduceLROnPlateau": "one line",
    "plugins MixedPrecision": "one line",
    "plugins XLACheckpointIO": "one line",
    "logger WandbLogger": "one line",
    "precision 16-mixed": "one line",
}


def test_every_argument_of_the_trainer_has_a_case():
    assert set(SAMPLE) <= set(all_cases())


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_it_works_or_is_refused_in_one_line(name, tmp_path):
    result, said = verdict(all_cases()[name], tmp_path)
    assert result == SAMPLE[name], said
