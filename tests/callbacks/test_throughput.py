import time

import lightning as L
import pytest
import torch

from cola_lightning.callbacks import Throughput
from tests.conftest import loader, tiny_trainer


class Slow(L.Callback):
    """Makes validation take its time, and watches what is logged."""

    def __init__(self):
        self.speeds = {}

    def on_validation_batch_end(self, *_):
        time.sleep(0.2)

    def on_train_batch_start(self, trainer, *_):
        if "train/tokens_per_second" in trainer.callback_metrics:
            self.speeds[trainer.global_step] = float(trainer.callback_metrics["train/tokens_per_second"])


def learnt(batches):
    return sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)


def test_counts_tokens_that_are_learnt_and_goes_on_over_a_resume():
    first, second = Throughput(), Throughput()
    run, model, batches = tiny_trainer(first, steps=5, log_every_n_steps=2)
    run.fit(model, loader(batches))
    assert float(run.callback_metrics["train/tokens"]) == learnt(batches[:4])
    assert first.state_dict() == {"tokens": learnt(batches[:4]), "since": learnt(batches[4:5])}
    second.load_state_dict(first.state_dict())
    run, model, batches = tiny_trainer(second, steps=2, log_every_n_steps=2)
    run.fit(model, loader(batches))
    assert float(run.callback_metrics["train/tokens"]) == learnt(batches[:5]) + learnt(batches[:2])


def test_validation_is_outside_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Clock(L.Callback):
        def on_train_batch_start(self, *_):
            now[0] += 1.0

        def on_validation_batch_start(self, *_):
            now[0] += 100.0

    watch = Slow()
    run, model, batches = tiny_trainer(Clock(), Throughput(), watch, steps=4, val_check_interval=2, log_every_n_steps=1)
    run.fit(model, loader(batches), loader(batches[:1]))
    expected = {step: learnt(batches[step - 1 : step]) for step in (1, 2, 3)}
    assert watch.speeds == pytest.approx(expected)


def test_the_device_is_not_asked_between_logs(monkeypatch):
    callback = Throughput()
    run, model, batches = tiny_trainer(callback, steps=4, log_every_n_steps=4)
    asked = []
    original = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: asked.append(1) or original(self))
    run.fit(model, loader(batches))
    assert len(asked) == 1
