"""Steps and validations of runs that are short, end between two validations, or are resumed, by a count."""

import shutil
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from cola_lightning.callbacks import Checkpoints
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA
from cola_lightning.optim import WarmupCosine
from cola_lightning.training.module import LanguageModel
from cola_lightning.training.pending_validation import NOTE, validated
from cola_lightning.training.validation_schedule import is_last_step
from tests.conftest import loader

IDS = torch.randint(1, 50, (22, 8), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS[:2], "labels": IDS[:2]}


class Steps(DummyLogger):
    """At which steps each curve has a point."""

    def __init__(self):
        super().__init__()
        self.curves = {"train/loss": [], "val/perplexity": []}

    def log_metrics(self, metrics, step=None):
        for name in self.curves.keys() & metrics.keys():
            self.curves[name].append(step)


class WholeRun(L.LightningDataModule):
    """One epoch is the run, as in this package."""

    def train_dataloader(self):
        return loader([BATCH] * (self.trainer.max_steps * self.trainer.accumulate_grad_batches))

    def val_dataloader(self):
        return loader([BATCH])


class Epochs(WholeRun):
    """Epochs of six batches, of which the last is smaller."""

    def train_dataloader(self):
        return DataLoader([{"input_ids": row, "labels": row} for row in IDS], batch_size=4)


def fit(data, folder, steps, resume=None, every=100, callbacks=(), model=None, **settings):
    logger = Steps()
    parts = {"projection": partial(CoLA, rank=4), "schedule": partial(WarmupCosine, warmup_steps=2)}
    model = LanguageModel(50, 16, 24, 1, 2, **(parts | (model or {})))
    checkpoints = Checkpoints(every, keep=99, dirpath=str(folder))
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=logger, callbacks=[checkpoints, *callbacks],
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
        **({"max_epochs": -1, "val_check_interval": 4, "log_every_n_steps": 1} | settings),
    )  # fmt: skip
    trainer.fit(model, datamodule=data(), ckpt_path=resume and str(resume), weights_only=True)
    return logger.curves, trainer


RUNS = {
    # The data, settings, and the steps validated in a run of 20, which a resumed one must keep to
    "the run is an epoch": (WholeRun, {}, [3, 7, 11, 15, 19]),
    "with accumulation": (WholeRun, {"accumulate_grad_batches": 2, "val_check_interval": 8}, [3, 7, 11, 15, 19]),
    "epochs": (Epochs, {}, [3, 9, 15, 19]),
    "validated by epochs": (Epochs, {"val_check_interval": 1.0}, [5, 11, 17, 19]),
    "counted through epochs": (Epochs, {"check_val_every_n_epoch": None}, [3, 7, 11, 15, 19]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "end"), [*((kind, 12) for kind in RUNS), ("the run is an epoch", 10), ("epochs", 10)])
def test_a_resumed_run_keeps_to_the_steps_of_an_unbroken_one(kind, end, tmp_path):
    """Resumed with more steps, in the middle, before a validation, and where the shorter run ended: in its own folder
    and in another, and where the process died in the validation of that step."""
    data, settings, expected = RUNS[kind]
    curves, _ = fit(data, tmp_path / "unbroken", 20, **settings)
    assert curves == {"train/loss": list(range(20)), "val/perplexity": expected}
    curves, _ = fit(data, tmp_path / "short", end, every=6, **settings)
    assert curves["val/perplexity"] == sorted({step for step in expected if step < end} | {end - 1})
    for step, own_folder, died in ((6, True, False), (end, False, False), (end, True, True)):
        shutil.copytree(tmp_path / "short", tmp_path / "run", symlinks=True)
        if died:
            torch.save({"steps": [4], "callbacks": {4: {}}}, tmp_path / "run" / NOTE)
        folder = tmp_path / ("run" if own_folder else "other")
        curves, _ = fit(data, folder, 20, tmp_path / "run" / f"step_{step:08}.ckpt", **settings)
        assert curves["train/loss"] == list(range(step, 20))
        assert curves["val/perplexity"] == [s for s in expected if s >= step - died]
        for used in ("run", "other"):
            shutil.rmtree(tmp_path / used, ignore_errors=True)


def test_other_micro_batches_leave_steps_and_validations_where_they_are(tmp_path):
    """Seven steps of four micro-batches, then steps of three: step 8 is the next one that is validated."""
    fit(WholeRun, tmp_path, 7, accumulate_grad_batches=4, val_check_interval=16)
    curves, _ = fit(WholeRun, tmp_path, 12, tmp_path / "last.ckpt", accumulate_grad_batches=3, val_check_interval=12)
    assert curves == {"train/loss": [7, 8, 9, 10, 11], "val/perplexity": [7, 11]}


@pytest.mark.parametrize(
    ("data", "steps", "settings", "expected"),
    [
        (WholeRun, 10, {}, [3, 7, 9]),
        (WholeRun, 3, {}, [2]),
        (WholeRun, 3, {"accumulate_grad_batches": 2, "val_check_interval": 200}, [2]),
        (Epochs, 3, {}, [2]),
        (Epochs, 20, {"max_epochs": 2}, [3, 9, 11]),
        (Epochs, 8, {"check_val_every_n_epoch": 2}, [7]),
        (WholeRun, 3, {"limit_val_batches": 0}, []),
    ],
)
def test_the_last_model_is_validated_once(data, steps, settings, expected, tmp_path):
    curves, trainer = fit(data, tmp_path, steps, **settings)
    assert curves["val/perplexity"] == expected
    if expected:
        shown = float(trainer.callback_metrics["val/perplexity"])
        (again,) = trainer.validate(trainer.lightning_module, datamodule=data(), verbose=False)
        assert again["val/perplexity"] == shown


def test_the_last_step_is_recognized_once_it_is_made(tmp_path):
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(is_last_step(trainer))

    fit(WholeRun, tmp_path, 3, callbacks=[Look()])
    assert seen == [False, False, True]


def test_an_interval_beyond_an_epoch_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="val_check_interval 10 is more than the 6 batches of an epoch"):
        fit(Epochs, tmp_path, 20, val_check_interval=10)


class Best(L.Callback):
    """Notes the smallest value that a validation had. The first one is the best."""

    def __init__(self) -> None:
        self.validations, self.best = 0, None

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validations += 1
            self.best = self.validations if self.best is None else min(self.best, self.validations)

    def state_dict(self):
        return {"validations": self.validations, "best": self.best}

    def load_state_dict(self, state):
        self.validations, self.best = state["validations"], state["best"]


@pytest.mark.parametrize("noted", [True, False])
def test_a_run_that_goes_back_validates_that_step_again_only_if_the_note_lacks_it(tmp_path, noted):
    """The checkpoint of step 4 is written before the validation of step 4, the best one. If the note beside it lacks
    the states of that step, the step is validated again."""
    fit(WholeRun, tmp_path, 12, every=4, callbacks=[Best()])
    if not noted:
        note = torch.load(tmp_path / NOTE, weights_only=True)
        del note["callbacks"][4]
        torch.save(note, tmp_path / NOTE)
    again = Best()
    curves, _ = fit(WholeRun, tmp_path, 9, tmp_path / "step_00000004.ckpt", callbacks=[again])
    assert curves["val/perplexity"] == ([7, 8] if noted else [3, 7, 8])
    assert again.state_dict() == {"validations": 3, "best": 1}


def test_states_of_steps_without_a_checkpoint_are_dropped(tmp_path):
    fit(WholeRun, tmp_path, 12, every=8, callbacks=[Best()])
    note = torch.load(tmp_path / NOTE, weights_only=True)
    assert note["steps"] == [4, 8, 12]
    assert list(note["callbacks"]) == [8, 12]


def test_a_run_that_goes_back_removes_later_steps_from_the_note(tmp_path):
    fit(WholeRun, tmp_path, 12, every=4)
    assert validated(tmp_path) == [4, 8, 12]
    curves, _ = fit(WholeRun, tmp_path, 9, tmp_path / "step_00000004.ckpt")
    assert curves["val/perplexity"] == [7, 8]
    assert validated(tmp_path) == [4, 8, 9]
