import lightning as L
import pytest
from rich.console import Console

from cola_lightning.callbacks import Progress, Throughput
from tests.conftest import loader, tiny_trainer


class Bar(L.Callback):
    """What the bar shows after each batch: steps made and steps in all."""

    def __init__(self, progress):
        self.progress, self.shown = progress, []

    def on_train_batch_end(self, trainer, *_):
        task = self.progress.progress.tasks[self.progress.train_progress_bar_id]
        self.shown.append((task.completed, task.total))


@pytest.mark.parametrize(("accumulated", "shown"), [(1, [1, 2, 3, 4, 5, 6]), (2, [0, 1, 1, 2, 2, 3])])
def test_the_bar_counts_optimizer_steps_of_all_steps(accumulated, shown, monkeypatch):
    monkeypatch.setattr("cola_lightning.callbacks.progress.get_console", lambda: Console(force_terminal=True))
    progress = Progress()
    bar = Bar(progress)
    run, model, batches = tiny_trainer(
        progress, bar, steps=6 // accumulated, limit_train_batches=6, accumulate_grad_batches=accumulated,
        enable_progress_bar=True,
    )  # fmt: skip
    run.fit(model, loader(batches))
    assert bar.shown == [(steps, 6 // accumulated) for steps in shown]


def test_off_a_terminal_there_is_no_bar(monkeypatch):
    monkeypatch.setattr("cola_lightning.callbacks.progress.get_console", lambda: Console(force_terminal=False))
    progress = Progress()
    run, model, batches = tiny_trainer(progress, steps=1, enable_progress_bar=True)
    run.fit(model, loader(batches))
    assert progress.progress is None


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_the_bar_is_one_line_at_any_width(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("cola_lightning.callbacks.progress.get_console", lambda: Console(force_terminal=True))
    run, model, batches = tiny_trainer(
        Progress(), Throughput(), steps=6, limit_train_batches=6, enable_progress_bar=True
    )
    run.fit(model, loader(batches), loader(batches))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    last = next(line for line in reversed(lines) if line)
    assert last.startswith("Training")
    assert " 6/6 " in last
    assert max(map(len, lines)) <= width
    assert ("val/perplexity: " in last) == (width >= 100)
    assert not any(line.lstrip().startswith(("loss", "tok/s", "val/", "ty")) for line in lines)
