from types import SimpleNamespace

import pytest

from cola_lightning.batching import accumulate
from cola_lightning.data import C4DataModule, TextDataModule
from cola_lightning.errors import InputError


def trainer(replicas=None, interval=100):
    kwargs = replicas and {"num_replicas": replicas, "rank": 0}
    return SimpleNamespace(distributed_sampler_kwargs=kwargs, val_check_interval=interval, accumulate_grad_batches=1)


@pytest.mark.parametrize(("replicas", "micro_batches"), [(None, 16), (1, 16), (8, 2), (16, 1)])
def test_accumulates_to_the_stated_batch_and_validates_at_the_stated_steps(replicas, micro_batches):
    run = trainer(replicas)
    for _ in range(2):  # a second stage changes nothing
        accumulate(run, 512, 32)
        assert run.accumulate_grad_batches == micro_batches
        assert run.val_check_interval == 100 * micro_batches


def test_a_validation_interval_as_a_share_of_the_run_is_left_alone():
    run = trainer(interval=0.25)
    accumulate(run, 64, 32)
    assert run.val_check_interval == 0.25


def test_refuses_an_inexact_division_and_names_the_nearest_sizes():
    with pytest.raises(InputError, match=r"global_batch_size 500 .*batch_size 32 x 3 devices.*480 and 576"):
        accumulate(trainer(3), 500, 32)
    with pytest.raises(InputError, match=r"global_batch_size 8 .*nearest that are: 32"):
        accumulate(trainer(), 8, 32)


@pytest.mark.parametrize("make", [C4DataModule, lambda **settings: TextDataModule(["unused"], **settings)])
def test_a_batch_is_stated_in_rows_or_in_tokens(make):
    assert make(sequence_length=256, global_batch_tokens=131_072).global_batch_size == 512
    assert make(global_batch_size=512).global_batch_size == 512
    assert make().global_batch_size is None
    with pytest.raises(InputError, match=r"global_batch_tokens 1000 .*sequence_length 256; .*nearest.*: 768 and 1024"):
        make(sequence_length=256, global_batch_tokens=1000)
    with pytest.raises(InputError, match=r"global_batch_tokens 3 .*nearest that are: 256$"):
        make(sequence_length=256, global_batch_tokens=3)
    with pytest.raises(InputError, match=r"global_batch_size 512 and --data.global_batch_tokens 131072 both"):
        make(global_batch_size=512, global_batch_tokens=131_072)
