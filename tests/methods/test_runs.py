"""Whole runs of the methods: they learn, go on where they were stopped, and do the same on two processes."""

import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from cola_lightning.errors import InputError
from cola_lightning.methods import ReLoRACallback, SSTCallback, SwitchLoRACallback
from tests.methods import runs
from tests.methods.runs import CYCLE, METHODS, STEPS, train
from tests.processes import Run

pytestmark = pytest.mark.slow

DETERMINISTIC = [name for name in METHODS if "dropout" not in name]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def whole(method: str) -> tuple[runs.Result, dict[int, bytes]]:
    """Return a run in one process and some of its checkpoints.

    They are of the steps just before, at and after the first merge or re-sampling, and of the second, at which SST
    decomposes.
    """
    with TemporaryDirectory() as folder:
        result = train(method, callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)])
        steps = (CYCLE - 1, CYCLE, CYCLE + 1, 2 * CYCLE)
        return result, {step: (Path(folder) / f"step={step}.ckpt").read_bytes() for step in steps}


@pytest.mark.parametrize("method", METHODS)
def test_learns_more_than_how_often_tokens_occur(method):
    losses = whole(method)[0].losses
    assert len(losses) == STEPS
    assert losses[-1] < math.log(63) - 0.8  # all 63 tokens are equally frequent


# Without merges and the like one step is as good as another.
STOPS = [(m, step) for m in ("relora", "switch_lora", "sst") for step in (CYCLE - 1, CYCLE, CYCLE + 1, 2 * CYCLE)]
STOPS += [(m, CYCLE) for m in ("lora_dropout", "sltrain")]


@pytest.mark.parametrize(("method", "step"), STOPS)
def test_a_stopped_run_goes_on_bit_by_bit(method, step, tmp_path):
    result, checkpoints = whole(method)
    file = tmp_path / "stopped.ckpt"
    file.write_bytes(checkpoints[step])
    resumed = train(method, resume=file)
    assert resumed.trainer.global_step == STEPS
    assert resumed.losses[-(STEPS - step) :] == result.losses[step:]
    for name, tensor in result.weights.items():
        assert torch.equal(resumed.weights[name], tensor), name


@cache
def in_one_process(method: str) -> runs.Result:
    return train(method, steps=METHODS[method].comparable_steps, precision="64-true")


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """Return what each of two processes, which talk by gloo, had in the end, by method and rank."""
    folder = tmp_path_factory.mktemp("ddp")
    Run(runs.train_on_two_ranks, folder, *DETERMINISTIC, ranks=2, folder=folder).done()
    return {
        (m, rank): torch.load(folder / f"{m}_{rank}.pt", weights_only=True) for m in DETERMINISTIC for rank in range(2)
    }


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_two_processes_have_equal_weights_and_the_losses_of_one(method, on_two):
    first, second = on_two[method, 0], on_two[method, 1]
    expected = in_one_process(method)
    assert len(first["losses"]) == METHODS[method].comparable_steps
    assert first["losses"] == pytest.approx(expected.losses, rel=1e-9)
    for name in expected.weights:
        assert torch.equal(first["weights"][name], second["weights"][name]), name


@pytest.mark.parametrize("callback", [ReLoRACallback, SwitchLoRACallback, SSTCallback])
@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_surgery_is_refused_under_strategies_that_flatten(callback, strategy):
    trainer = SimpleNamespace(strategy=object.__new__(strategy))
    message = (
        f"{callback.__name__} changes single matrices and their optimizer state, which {strategy.__name__} flattens; "
        f"set --trainer.strategy fsdp2"
    )
    with pytest.raises(InputError, match=message):
        callback().setup(trainer, None, "fit")


# The two with gradients of their own under autocast, and all in pure bf16.
@pytest.mark.parametrize(
    ("method", "precision"),
    [("sltrain", "bf16-mixed"), ("sst", "bf16-mixed"), *((method, "bf16-true") for method in DETERMINISTIC)],
)
def test_precisions(method, precision):
    result = train(method, precision=precision)
    assert result.losses[-1] < math.log(63) - 0.6
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    for name, parameter in result.model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("sigma") else dtype), name


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_accumulated_gradients_give_the_same_run(method):
    """Two batches of four rows a step, which are the eight of the others."""
    expected = in_one_process(method)
    steps = METHODS[method].comparable_steps
    halves = train(method, steps=steps, accumulate_grad_batches=2, batch_size=4, precision="64-true")
    assert halves.trainer.global_step == expected.trainer.global_step == METHODS[method].comparable_steps
    ids = torch.arange(60).view(2, 30)
    torch.testing.assert_close(halves.model.eval()(ids), expected.model.eval()(ids), atol=1e-9, rtol=0)
