import time

import lightning as L
import pytest
import torch

from cola_lightning.callbacks import Throughput
from cola_lightning.callbacks.throughput import flops_per_token
from cola_lightning.costs.counters import count_flops
from cola_lightning.methods import CoLA, CoLAM
from cola_lightning.training.module import LanguageModel
from tests.conftest import loader, tiny_trainer
from tests.recorder import Recorder, metrics


def learnt(batches):
    return sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)


def test_counts_tokens_that_are_learnt_and_goes_on_over_a_resume():
    first, second = Throughput(), Throughput()
    run, model, batches = tiny_trainer(first, steps=5, log_every_n_steps=2)
    run.fit(model, loader(batches))
    assert float(run.callback_metrics["train/tokens"]) == learnt(batches[:4])
    assert first.state_dict() == {"tokens": learnt(batches[:5])}
    second.load_state_dict(first.state_dict())
    run, model, batches = tiny_trainer(second, steps=2, log_every_n_steps=2)
    run.fit(model, loader(batches))
    assert float(run.callback_metrics["train/tokens"]) == learnt(batches[:5]) + learnt(batches[:2])


def test_after_a_resume_speed_counts_the_tokens_of_this_process_over_its_time(monkeypatch):
    """Between two logs the first process has made steps, and the second may start a night later."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Clock(L.Callback):
        def on_train_batch_start(self, *_):
            now[0] += 1.0

    resumed = Throughput()
    resumed.load_state_dict({"tokens": 1000})
    now[0] = 1e6
    run, model, batches = tiny_trainer(Clock(), resumed, steps=2, log_every_n_steps=2)
    run.fit(model, loader(batches))
    assert float(run.callback_metrics["train/tokens"]) == 1000 + learnt(batches[:2])
    assert float(run.callback_metrics["train/tokens_per_second"]) == pytest.approx(learnt(batches[:2]) / 2)


def test_validation_is_outside_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Clock(L.Callback):
        def on_train_batch_start(self, *_):
            now[0] += 1.0

        def on_validation_batch_start(self, *_):
            now[0] += 100.0

    watch = Recorder("on_train_batch_start", metrics=metrics)
    run, model, batches = tiny_trainer(Clock(), Throughput(), watch, steps=4, val_check_interval=2, log_every_n_steps=1)
    run.fit(model, loader(batches), loader(batches[:1]))
    expected = {step: learnt(batches[step - 1 : step]) for step in (1, 2, 3)}
    speeds = {step: logged["train/tokens_per_second"] for step, logged in watch.by_step("metrics").items() if step}
    assert speeds == pytest.approx(expected)


def test_the_device_is_not_synchronized_between_logs(monkeypatch):
    callback = Throughput()
    run, model, batches = tiny_trainer(callback, steps=4, log_every_n_steps=4)
    asked = []
    for name in ("__int__", "tolist"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, ask=original: asked.append(1) or ask(self))
    run.fit(model, loader(batches))
    assert len(asked) == 1


def test_time_spent_waiting_for_data_is_logged(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class SlowLoader(list):
        def __iter__(self):
            for batch in super().__iter__():
                now[0] += 1.0
                yield batch

    class Clock(L.Callback):
        def on_train_batch_start(self, *_):
            now[0] += 3.0

    seen = Recorder("on_train_batch_start", metrics=metrics)
    run, model, batches = tiny_trainer(Throughput(), Clock(), seen, steps=4)
    profiler = run.profiler
    run.fit(model, SlowLoader(batches))
    assert [value["train/data_wait"] for value in seen.values["metrics"][1:]] == pytest.approx([0.25] * 3)
    assert run.profiler is profiler


def test_mfu_and_hfu_are_counted_flops_over_the_peak(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Clock(L.Callback):
        def on_train_batch_start(self, *_):
            now[0] += 2.0

    seen = Recorder("on_train_batch_start", metrics=metrics)
    run, model, batches = tiny_trainer(
        Throughput(peak_tflops=1e-6), CoLAM(), Clock(), seen, steps=4, accumulate_grad_batches=2
    )
    run.fit(model, loader(batches))
    flops = flops_per_token(model, 8)
    assert flops.recomputed > 0
    positions = 2 * 3 * 8  # padding is computed too
    assert seen.values["metrics"][-1]["train/mfu"] == pytest.approx(flops.model * positions / 4.0 / 1e6)
    assert seen.values["metrics"][-1]["train/hfu"] == pytest.approx(flops.hardware * positions / 4.0 / 1e6)
    assert seen.values["metrics"][-1]["train/tflops_per_device"] == pytest.approx(flops.model * positions / 4.0 / 1e12)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["residual_and_latents", "latents", "block_input"])
def test_flops_of_a_token_are_those_of_a_real_step(keep):
    layers, hidden, length = 3, 32, 16
    model = LanguageModel(64, hidden, 48, layers, 4, projection=lambda i, o: CoLA(i, o, rank=8))
    callback = CoLAM(keep)
    model.transforms.append(callback.apply)
    flops = flops_per_token(model, length)
    ids = torch.ones(2, length, dtype=torch.long)
    checkpointed = model.build()
    callback.apply(checkpointed)
    assert count_flops(lambda: checkpointed(ids).sum().backward()) == flops.hardware * ids.numel()
    numbers = sum(p.numel() for name, p in checkpointed.named_parameters() if p.dim() > 1 and "embed" not in name)
    assert flops.model == 6 * numbers + 12 * layers * length * hidden
