import os
import resource
import signal

import pytest
import torch

from cola_lightning.callbacks import Checkpoints
from cola_lightning.callbacks.checkpoints import FileWriter
from cola_lightning.checkpoints import damage, read
from cola_lightning.checkpoints.newest import newest_whole
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
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_stay_and_the_end_is_among_them(tmp_path):
    callback = fit(tmp_path, 5)
    assert names(tmp_path) == ["last.ckpt", "step_00000004.ckpt", "step_00000005.ckpt"]
    assert os.readlink(tmp_path / "last.ckpt") == "step_00000005.ckpt"
    assert callback.last_model_path == str(tmp_path / "step_00000005.ckpt")
    assert all(damage(path) is None for path in tmp_path.iterdir())


def test_where_the_newest_is_damaged_the_one_before_is_used(tmp_path):
    fit(tmp_path, 5)
    expected = {name: weight.clone() for name, weight in read(tmp_path / "last.ckpt").weights.items()}
    os.truncate(tmp_path / "step_00000005.ckpt", 5000)
    with pytest.warns(UserWarning, match="step_00000005.ckpt is damaged"):
        fit(tmp_path, 5, resume="last")
    assert damage(tmp_path / "step_00000005.ckpt") is None
    for name, weight in read(tmp_path / "last.ckpt").weights.items():
        assert torch.equal(weight, expected[name])


def test_no_checkpoint_is_taken_between_two_steps(tmp_path):
    """It would count batches whose gradient it has not."""
    fit(tmp_path, 4, every=2, batches=12, accumulate_grad_batches=3, limit_train_batches=12)
    taken = (tmp_path / "step_00000002.ckpt").stat().st_mtime_ns
    fit(tmp_path, 3, every=2, resume=str(tmp_path / "step_00000002.ckpt"), batches=12, accumulate_grad_batches=3,
        limit_train_batches=12)  # fmt: skip
    assert (tmp_path / "step_00000003.ckpt").exists()
    assert not (tmp_path / "step_00000002.ckpt").exists() or (
        (tmp_path / "step_00000002.ckpt").stat().st_mtime_ns == taken
    )


def die_while_writing(folder: str) -> None:
    class Dying(FileWriter):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            super().save_checkpoint(checkpoint, path)
            if checkpoint["global_step"] == 4:
                os.truncate(path, 5000)
                os.kill(os.getpid(), signal.SIGKILL)

    import cola_lightning.callbacks.checkpoints as module

    module.FileWriter = Dying
    fit(folder, 6)


def test_a_crash_while_writing_leaves_what_was_there(tmp_path):
    folder = tmp_path / "run"
    assert Run(die_while_writing, str(folder), ranks=1, folder=tmp_path).wait() == [-signal.SIGKILL]
    assert names(folder) == ["last.ckpt", "step_00000002.ckpt", "step_00000004.ckpt.partial"]
    assert newest_whole(folder) == folder / "step_00000002.ckpt"
    fit(folder, 6, resume="last")
    assert names(folder) == ["last.ckpt", "step_00000004.ckpt", "step_00000006.ckpt"]


def fill_the_disk(folder: str, ranks: int) -> None:
    """From the second checkpoint on, a file may have no more than 10,000 bytes."""

    class Narrowing(Checkpoints):
        def save(self, trainer):
            super().save(trainer)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    callback = Narrowing(2, dirpath=folder)
    strategy = "ddp" if ranks > 1 else "auto"
    run, model, data = tiny_trainer(callback, steps=6, enable_checkpointing=True, devices=ranks, strategy=strategy)
    run.fit(model, loader(data * ranks))
    assert run.global_step == 6


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path, ranks):
    folder = tmp_path / "run"
    run = Run(fill_the_disk, str(folder), ranks, ranks=ranks, folder=tmp_path)
    run.done()
    assert names(folder) == ["last.ckpt", "step_00000002.ckpt"]
    assert damage(folder / "last.ckpt") is None
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
