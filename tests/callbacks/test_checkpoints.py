import errno
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cola_lightning.callbacks import Checkpoints
from cola_lightning.callbacks.checkpoints import UnsavedError
from cola_lightning.checkpoints import find_corruption, lock, read
from cola_lightning.checkpoints.latest import latest_valid
from cola_lightning.checkpoints.writer import FileWriter
from cola_lightning.errors import InputError
from tests.conftest import loader, tiny_trainer
from tests.processes import Run


def fit(folder, steps, every=2, resume=None, batches=None, **trainer):
    callback = Checkpoints(every, dirpath=str(folder))
    run, model, data = tiny_trainer(callback, steps=steps, enable_checkpointing=True, **trainer)
    # one batch over and over, for these loaders do not resume
    run.fit(model, loader(data[:1] * (batches or steps)), ckpt_path=resume, weights_only=True)
    return callback


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != lock.NAME)


def test_the_newest_stay_and_the_end_is_among_them(tmp_path):
    callback = fit(tmp_path, 5)
    assert names(tmp_path) == ["last.ckpt", "step_00000004.ckpt", "step_00000005.ckpt"]
    assert os.readlink(tmp_path / "last.ckpt") == "step_00000005.ckpt"
    assert callback.last_model_path == str(tmp_path / "step_00000005.ckpt")
    assert all(find_corruption(path) is None for path in tmp_path.iterdir())


def test_where_the_newest_is_damaged_the_one_before_is_used(tmp_path):
    fit(tmp_path, 5)
    expected = {name: weight.clone() for name, weight in read(tmp_path / "last.ckpt").weights.items()}
    os.truncate(tmp_path / "step_00000005.ckpt", 5000)
    with pytest.warns(UserWarning, match="step_00000005.ckpt is damaged"):
        fit(tmp_path, 5, resume="last")
    assert find_corruption(tmp_path / "step_00000005.ckpt") is None
    for name, weight in read(tmp_path / "last.ckpt").weights.items():
        assert torch.equal(weight, expected[name])


@pytest.fixture
def fail_first_rename(monkeypatch):
    """Return a function that lets the first rename to a file of this name fail with this error number."""
    rename, failed = os.replace, []

    def arm(name: str, number: int) -> list:
        def replace(source, target):
            if str(target).endswith(name) and not failed:
                failed.append(target)
                raise OSError(number, os.strerror(number))
            rename(source, target)

        monkeypatch.setattr(os, "replace", replace)
        return failed

    return arm


def test_no_checkpoint_is_written_in_the_middle_of_a_step(tmp_path, fail_first_rename):
    """It would count batches whose gradients it has not. After step 2 could not be saved, the next three batches end
    with ``global_step`` still at 2 and no checkpoint of it: only the state of the accumulation says not to save."""
    failed = fail_first_rename("step_00000002.ckpt", errno.EIO)
    with pytest.warns(UserWarning, match="tries again in 2 steps"):
        fit(tmp_path, 4, every=2, batches=12, accumulate_grad_batches=3, limit_train_batches=12)
    assert failed
    assert names(tmp_path) == ["last.ckpt", "step_00000004.ckpt"]


def die_while_writing(folder: str) -> None:
    class Dying(FileWriter):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            super().save_checkpoint(checkpoint, path)
            if checkpoint["global_step"] == 4:
                os.truncate(path, 5000)
                os.kill(os.getpid(), signal.SIGKILL)

    import cola_lightning.checkpoints.writer as module

    module.FileWriter = Dying
    fit(folder, 6)


@pytest.mark.distributed
def test_a_crash_while_writing_leaves_what_was_there(tmp_path):
    folder = tmp_path / "run"
    assert Run(die_while_writing, str(folder), ranks=1, folder=tmp_path).wait() == [-signal.SIGKILL]
    assert names(folder) == ["last.ckpt", "step_00000002.ckpt", "step_00000004.ckpt.partial"]
    assert latest_valid(folder) == folder / "step_00000002.ckpt"
    fit(folder, 6, resume="last")
    assert names(folder) == ["last.ckpt", "step_00000004.ckpt", "step_00000006.ckpt"]


def fill_the_disk(folder: str, ranks: int) -> None:
    """From the second checkpoint on, a file may have no more than 10,000 bytes."""

    class Narrowing(Checkpoints):
        def save(self, trainer, at_end=False):
            super().save(trainer, at_end)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    callback = Narrowing(2, dirpath=folder, minutes_at_end=0)
    strategy = "ddp" if ranks > 1 else "auto"
    run, model, data = tiny_trainer(callback, steps=6, enable_checkpointing=True, devices=ranks, strategy=strategy)
    with pytest.raises(UnsavedError, match="step 6, the last of this run, is not on the disk"):
        run.fit(model, loader(data * ranks))
    assert run.global_step == 6
    sys.exit(UnsavedError.exit_status)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_lets_the_run_go_on_and_fail_at_its_end(tmp_path, ranks):
    folder = tmp_path / "run"
    run = Run(fill_the_disk, str(folder), ranks, ranks=ranks, folder=tmp_path)
    assert run.wait() == [1] * ranks, run.output()
    assert names(folder) == ["last.ckpt", "step_00000002.ckpt"]
    assert find_corruption(folder / "last.ckpt") is None
    told = "could not be written: [Errno 27] File too large. The run goes on and tries again in 2 steps; the newest "
    assert told + f"checkpoint is {folder / 'step_00000002.ckpt'}" in run.logs[0].read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_train_steps": 0}, "every_n_train_steps is 0; it must be at least 1"),
        ({"keep": 1}, "keep is 1; keep at least 2"),
        ({"dirpath": "s3://bucket/run"}, "s3://bucket/run is not a folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Checkpoints(**arguments)


class Stop(L.Callback):
    """Ask the run to stop in the validation after a step, as EarlyStopping does."""

    def __init__(self, step):
        self.step = step

    def on_validation_end(self, trainer, pl_module):
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


@pytest.mark.parametrize(
    ("steps", "trainer"),
    [
        (3, {"callback": Stop(3), "limit_val_batches": 1, "val_check_interval": 3}),
        (5, {"limit_train_batches": 5, "max_steps": 100}),  # max_epochs is 1
    ],
    ids=["early stopping", "max_epochs"],
)
def test_however_a_run_ends_its_last_step_is_saved_and_it_goes_on_from_there(tmp_path, steps, trainer):
    trainer = dict(trainer)
    extra = [trainer.pop("callback")] if "callback" in trainer else []
    limit = trainer.pop("max_steps", 6)

    def run(folder, resume=None):
        fitted, model, data = tiny_trainer(
            Checkpoints(100, dirpath=str(folder)), steps=6, enable_checkpointing=True, limit_val_batches=0
        )
        fitted.fit(model, loader(data[:1] * 6), loader(data[:1]), ckpt_path=resume, weights_only=True)
        return model

    arguments = {"enable_checkpointing": True, "limit_train_batches": 6} | trainer
    fitted, model, data = tiny_trainer(Checkpoints(100, dirpath=str(tmp_path)), *extra, steps=limit, **arguments)
    fitted.fit(model, loader(data[:1] * 6), loader(data[:1]))
    assert names(tmp_path) == ["last.ckpt", f"step_{steps:08}.ckpt", "validated"]
    assert read(tmp_path / "last.ckpt").step == steps
    if "limit_train_batches" in trainer:
        return  # there is no more of its only epoch
    resumed = run(tmp_path, "last")
    whole = run(tmp_path / "whole")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_checkpoints_of_others_stay(tmp_path):
    best = ModelCheckpoint(tmp_path, "best-{step}", monitor="val/perplexity", save_top_k=3, every_n_train_steps=1)
    fitted, model, data = tiny_trainer(
        Checkpoints(1, dirpath=str(tmp_path)), best, steps=6, enable_checkpointing=True, val_check_interval=1
    )
    fitted.fit(model, loader(data), loader(data[:1]))
    assert names(tmp_path)[-3:] == ["step_00000005.ckpt", "step_00000006.ckpt", "validated"]
    assert sorted(map(Path, best.best_k_models)) == sorted(tmp_path.glob("best-*.ckpt"))
    assert len(best.best_k_models) == 3
    assert all(find_corruption(Path(path)) is None for path in best.best_k_models)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_rename_that_fails_is_treated_as_a_failed_write(tmp_path, fail_first_rename, number):
    failed = fail_first_rename("step_00000002.ckpt", number)
    with pytest.warns(UserWarning, match=f"could not be written: .*{os.strerror(number)}"):
        fit(tmp_path, 4)
    assert failed
    assert names(tmp_path) == ["last.ckpt", "step_00000004.ckpt"]


def test_a_run_fails_at_its_end_if_no_rename_succeeds(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", fail)
    callback = Checkpoints(2, dirpath=str(tmp_path), minutes_at_end=0.001)
    run, model, data = tiny_trainer(callback, steps=3, enable_checkpointing=True)
    with pytest.raises(UnsavedError, match=r"step 3, the last .* The newest checkpoint is none; make room"):
        run.fit(model, loader(data))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_copy_whose_link_was_followed_goes_on(tmp_path, kind):
    fit(tmp_path, 4, batches=6, limit_train_batches=6)
    last = tmp_path / "last.ckpt"
    target = last.resolve()
    last.unlink()
    if kind == "file":
        shutil.copy(target, last)
    else:
        last.mkdir()
        (last / "anything").write_text("of a checkpoint in parts")
    fit(tmp_path, 6, resume="last")
    assert os.readlink(last) == "step_00000006.ckpt"


def test_a_link_that_cannot_be_made_does_not_lead_back(tmp_path, monkeypatch):
    fit(tmp_path, 4, batches=6, limit_train_batches=6)

    def fail(self, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "symlink_to", fail)
    with pytest.warns(UserWarning, match=r"last.ckpt could not be changed .*step_00000006.ckpt"):
        fit(tmp_path, 6, resume="last")
    assert latest_valid(tmp_path) == tmp_path / "step_00000006.ckpt"


@pytest.mark.distributed
def test_another_process_cannot_run_in_the_same_folder(tmp_path):
    holder = Run(hold, str(tmp_path), ranks=1, folder=tmp_path / "logs")
    deadline = time.monotonic() + 300
    while not (tmp_path / "held").exists():
        assert time.monotonic() < deadline, holder.output()
        time.sleep(0.02)
    with pytest.raises(InputError, match=rf"in use by another run \(process {holder.processes[0].pid} on"):
        fit(tmp_path, 2)
    holder.kill(signal.SIGKILL)
    fit(tmp_path, 2)  # the lock died with its process
    assert not (tmp_path / lock.NAME).exists()


def hold(folder: str) -> None:
    lock.lock(Path(folder))
    Path(folder, "held").touch()
    time.sleep(600)
