"""The same curve under every strategy, in two real processes that talk by gloo, with CoLA-M and without; the rest of it
from the middle, bit for bit; and the same weights out of each strategy's checkpoint.

FSDP of the first generation runs on GPUs only.
"""

import json
from functools import cache, partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import DataLoader

from cola_lightning.callbacks import Checkpoints
from cola_lightning.checkpoints import find_corruption, read
from cola_lightning.cli.app import main
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA
from cola_lightning.training.module import LanguageModel
from tests.conftest import loader, tiny_trainer
from tests.distributed.parity_run import (
    CLIP,
    GLOBAL_BATCH,
    KEEPS,
    MICRO_BATCH,
    OTHERS,
    STEPS,
    DeepSpeedOnCPU,
    Rows,
    train,
    train_each,
)
from tests.processes import Run
from tests.record_curves import ASSET, TOLERANCE, difference, in_hex

EVERY = ["ddp", "fsdp2", "deepspeed_1", "deepspeed_2", "deepspeed_3"]
VARIANTS = ["fsdp2_sharded", "deepspeed_2_offload", "deepspeed_3_offload"]
# Steps that are compared in float32. LaX doubles the distance that rounding makes about every step: after 20 steps one
# norm is 1e-2 off, and the comparison would let faults of that size pass.
FLOAT32_STEPS = {"lax": 8}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where a strategy's runs lie; they are made when first asked for.

    ``auto`` and ``auto_32`` are one process, in float64 and in float32, that takes the batch in one piece. The ranks of
    other strategies accumulate two micro-batches each.
    """

    @cache
    def run(strategy: str, micro_batch: int | None = None) -> Path:
        out = tmp_path_factory.mktemp(strategy)
        alone = strategy.startswith("auto")
        if strategy in VARIANTS or (strategy == "auto" and micro_batch):
            keeps = ["none"]
        else:
            keeps = ["none", *OTHERS] if strategy == "auto_32" else [*KEEPS, *OTHERS]
        micro_batch = micro_batch or (GLOBAL_BATCH if alone else MICRO_BATCH)
        ranks = 1 if alone else 2
        Run(train_each, strategy, ranks, str(out), keeps, micro_batch, ranks=ranks, folder=out).done()
        return out

    return run


@pytest.fixture(scope="module")
def noise(trained):
    """How far rounding alone takes losses and norms of a network apart in float32 on this machine: the largest distance
    between runs of one process that cut the batch otherwise."""

    @cache
    def measured(keep: str) -> tuple[float, float]:
        steps = FLOAT32_STEPS.get(keep, STEPS)
        whole = curve(trained("auto_32") / keep, steps)
        cuts = [curve(trained("auto_32", micro_batch) / keep, steps) for micro_batch in (4, 2, 1)]
        losses, norms = (max(distance(cut[part], whole[part]) for cut in cuts) for part in (0, 1))
        assert 0 < losses < 1e-5
        assert 0 < norms < 1e-3
        return losses, norms

    return measured


def distance(values: list[float], expected: list[float]) -> float:
    """Return the largest relative difference."""
    assert len(values) == len(expected)
    return max(abs(value - right) / abs(right) for value, right in zip(values, expected, strict=True))


def curve(folder: Path, steps: int = STEPS) -> tuple[list[float], list[float]]:
    """Return the losses, and the gradient norms before clipping, of the first steps."""
    losses, norms = json.loads((folder / "curve.json").read_text())
    return losses[:steps], norms[:steps]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "keep"),
    [(name, keep) for name in EVERY for keep in (*KEEPS, *OTHERS)] + [(name, "none") for name in VARIANTS],
)
def test_two_processes_give_the_curve_of_one(trained, noise, strategy, keep):
    """In float64 to 1e-9. DeepSpeed has no float64: there, within ten times of what rounding does to one process."""
    deepspeed = strategy.startswith("deepspeed")
    network = keep if keep in OTHERS else "none"
    steps = FLOAT32_STEPS.get(network, STEPS) if deepspeed else STEPS
    losses, norms = curve(trained(strategy) / keep, steps)
    assert len(losses) == steps
    expected_losses, expected_norms = curve(trained("auto_32" if deepspeed else "auto") / network, steps)
    of_losses, of_norms = (10 * bound for bound in noise(network)) if deepspeed else (1e-9, 1e-9)
    assert distance(losses, expected_losses) <= of_losses
    assert distance(norms, expected_norms) <= of_norms


@pytest.mark.distributed
@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_the_curve_does_not_depend_on_how_the_batch_is_cut(trained, micro_batch):
    cut, whole = (curve(trained("auto", size) / "none") for size in (micro_batch, None))
    assert distance(cut[0], whole[0]) <= 1e-9
    assert distance(cut[1], whole[1]) <= 1e-9


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_losses_and_gradient_norms_are_those_recorded(trained, strategy):
    stored = json.loads(ASSET.read_text())["curves"]
    for keep in (*KEEPS, *OTHERS):
        found = in_hex(*curve(trained(strategy) / keep))
        assert difference(found, stored[f"strategy/{strategy}/{keep}@64-true"]) <= TOLERANCE, keep


@pytest.mark.distributed
def test_clipping_is_at_work_and_the_model_learns(trained):
    losses, norms = curve(trained("auto") / "none")
    assert sum(norm > CLIP for norm in norms) >= STEPS / 2
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["auto", *EVERY, *VARIANTS])
def test_a_resumed_run_goes_on_bit_for_bit_and_any_checkpoint_gives_its_weights(trained, tmp_path, strategy):
    whole = trained(strategy) / "none"
    assert find_corruption(whole / "step_00000010.ckpt") is None
    ranks, micro_batch = (1, GLOBAL_BATCH) if strategy == "auto" else (2, MICRO_BATCH)
    resume = str(whole / "step_00000010.ckpt")
    Run(train, strategy, ranks, str(tmp_path), "none", resume, micro_batch, ranks=ranks, folder=tmp_path).done()
    assert [values[10:] for values in curve(whole)] == list(curve(tmp_path))

    end, resumed = read(whole / "step_00000020.ckpt"), read(tmp_path / "last.ckpt")
    assert end.step == resumed.step == STEPS
    deepspeed = strategy.startswith("deepspeed")
    alone = read(trained("auto_32" if deepspeed else "auto") / "none" / "last.ckpt")
    assert end.weights.keys() == resumed.weights.keys() == alone.weights.keys()
    for name, weight in end.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
        torch.testing.assert_close(weight, alone.weights[name], rtol=0, atol=1e-3 if deepspeed else 1e-9)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("first", "then", "micro_batch"),
    [("ddp", "fsdp2", 2), ("fsdp2", "auto", 2), ("ddp", "auto", 8), ("auto", "ddp", 4)],
)
def test_one_file_goes_on_under_another_strategy(trained, tmp_path, first, then, micro_batch):
    """Weights and optimizer states: without the latter the first step would already be another. A step accumulates
    another number of micro-batches too: 2, and then 4 or 1; 1, and then 1 on each of two ranks."""
    resume = trained(first) / "none" / "step_00000010.ckpt"
    ranks = 1 if then == "auto" else 2
    Run(train, then, ranks, str(tmp_path), "none", str(resume), micro_batch, ranks=ranks, folder=tmp_path).done()
    losses, norms = curve(tmp_path)
    expected_losses, expected_norms = curve(trained("auto") / "none")
    assert distance(losses, expected_losses[10:]) <= 1e-9
    assert distance(norms, expected_norms[10:]) <= 1e-9


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ("fsdp2_sharded", "auto", r"is in shards, which SingleDeviceStrategy cannot go on from"),
        ("deepspeed_2", "ddp", r"is DeepSpeed's folder, which .* cannot go on from.*export"),
        ("ddp", "deepspeed_1", r"is one file, which DeepSpeedOnCPU cannot go on from"),
        ("deepspeed_2", "deepspeed_1", r"ZeRO-2 on 2 devices, which ZeRO-1 on 1 cannot go on from"),
    ],
)
def test_what_cannot_go_on_is_refused_before_anything_is_built(trained, tmp_path, first, then, message):
    with pytest.raises(InputError, match=message):
        train(then, 1, str(tmp_path), resume=str(trained(first) / "none" / "step_00000010.ckpt"))


def type_name(name: str, flags: list[str]) -> None:
    """``fit`` with a strategy by its bare name. Under DeepSpeed's, what Lightning keeps from a CPU is let through."""
    if name.startswith("deepspeed"):
        settings = StrategyRegistry[name]["init_params"] | {"process_group_backend": "gloo", "pin_memory": False}
        StrategyRegistry.register(name, DeepSpeedOnCPU, override=True, **settings)
    main(["fit", *flags, f"--trainer.strategy={name}"])


NAMES = ["ddp", "fsdp2", *(f"deepspeed_stage_{stage}" for stage in ("1", "2", "3", "2_offload", "3_offload"))]


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_a_bare_name_on_the_command_line_trains_clips_and_logs_the_norm(name, tiny_run, tmp_path):
    flags = [
        *tiny_run, f"--run_dir={tmp_path / 'run'}", "--trainer.devices=2", "--trainer.gradient_clip_val=0.5",
        "--trainer.max_steps=3", "--trainer.callbacks+=CoLAM",
    ]  # fmt: skip
    run = Run(type_name, name, flags, ranks=2, folder=tmp_path / "logs")
    run.done()
    scalars = {
        tag: [event.value for event in EventAccumulator(str(tmp_path / "run")).Reload().Scalars(tag)]
        for tag in ("train/loss", "train/gradient_norm", "val/perplexity")
    }
    assert len(scalars["train/loss"]) == 3
    assert all(0 < norm < 100 for norm in scalars["train/gradient_norm"])
    assert find_corruption(tmp_path / "run" / "checkpoints" / "step_00000003.ckpt") is None
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt").step == 3


@pytest.mark.parametrize("name", ["fsdp", "deepspeed_stage_2"])
def test_what_needs_a_gpu_says_so_in_one_line(name, tiny_run, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *tiny_run, "--trainer.logger=false", f"--trainer.strategy={name}"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert name in errors[0]
    assert "GPU" in errors[0]


def accumulate_gradients(ranks: int, out: str) -> None:
    """Two optimizer steps of four micro-batches each; write how often gradients were sent round."""
    sent = []

    def hook(state, bucket):
        sent.append(bucket.index())
        return default_hooks.allreduce_hook(state, bucket)

    class Listen(L.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.strategy.model.register_comm_hook(None, hook)

    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp", max_steps=2, max_epochs=1, accumulate_grad_batches=4,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Listen()],
    )  # fmt: skip
    model = LanguageModel(64, 32, 48, 1, 4, projection=partial(CoLA, rank=8))
    trainer.fit(model, DataLoader([Rows()[index] for index in range(16)], batch_size=1))
    Path(out, f"sent{trainer.global_rank}").write_text(json.dumps(sent))


@pytest.mark.distributed
def test_gradients_are_sent_once_an_optimizer_step(tmp_path):
    run = Run(accumulate_gradients, 2, str(tmp_path), ranks=2, folder=tmp_path)
    run.done()
    for rank in range(2):
        assert json.loads((tmp_path / f"sent{rank}").read_text()) == [0, 0], run.output()


@pytest.mark.gpu
def test_fsdp_trains_clips_and_resumes_on_a_gpu(tmp_path, process_group):
    def fit(steps, **resume):
        _, model, batches = tiny_trainer(steps=steps)
        trainer = L.Trainer(
            accelerator="gpu", devices=1, strategy="fsdp", max_steps=steps, max_epochs=1, gradient_clip_val=0.5,
            logger=False, log_every_n_steps=1, callbacks=[Checkpoints(3, dirpath=str(tmp_path))],
        )  # fmt: skip
        trainer.fit(model, loader(batches), **resume)
        return trainer

    assert fit(3).callback_metrics["train/gradient_norm"] > 0
    assert fit(6, ckpt_path="last").global_step == 6
    assert len(read(tmp_path / "last.ckpt").weights) > 0


def test_offload_needs_no_optimizer_of_deepspeeds_own():
    assert DeepSpeedOnCPU(stage=2, offload_optimizer=True).config["zero_force_ds_cpu_optimizer"] is False
