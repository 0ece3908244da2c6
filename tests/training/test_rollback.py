"""Which checkpoint is gone back to; going back itself is in tests/callbacks/test_loss_guard.py."""

from types import SimpleNamespace

import pytest
import torch

from cola_lightning.errors import InputError
from cola_lightning.training.rollback import find_checkpoint


def trainer(folder, last=""):
    callback = SimpleNamespace(dirpath=str(folder), last_model_path=str(last), best_model_path="")
    strategy = SimpleNamespace(broadcast=lambda value: value)
    return SimpleNamespace(checkpoint_callbacks=[callback], is_global_zero=True, strategy=strategy)


def write(folder, step, **more):
    path = folder / f"step_{step:08}.ckpt"
    torch.save(
        {"global_step": step, "loops": {}, "lr_schedulers": [], "state_dict": {"w": torch.ones(999)}} | more, path
    )
    return path


def test_the_newest_checkpoint_up_to_the_step_is_taken_or_else_the_oldest_after_it(tmp_path):
    paths = {step: write(tmp_path, step) for step in (8, 4, 12)}
    (tmp_path / "last.ckpt").symlink_to(paths[12].name)
    assert find_checkpoint(trainer(tmp_path, last=paths[12]), 11) == paths[8]
    assert find_checkpoint(trainer(tmp_path, last=paths[12]), 12) == paths[12]
    assert find_checkpoint(trainer(tmp_path), 3) == paths[4]


def test_damaged_checkpoints_and_those_of_weights_alone_are_skipped(tmp_path):
    good, altered, short = (write(tmp_path, step) for step in (2, 4, 6))
    content = bytearray(altered.read_bytes())
    content[len(content) // 2] ^= 1
    altered.write_bytes(content)
    short.write_bytes(short.read_bytes()[:1000])
    torch.save({"global_step": 8, "state_dict": {}}, tmp_path / "weights.ckpt")
    with pytest.warns(UserWarning, match="is damaged"):
        assert find_checkpoint(trainer(tmp_path), 9) == good


def test_without_a_checkpoint_the_error_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="no checkpoint of this run to go back to; write them more often"):
        find_checkpoint(trainer(tmp_path), 9)
    alone = trainer(tmp_path)
    alone.checkpoint_callbacks = []
    with pytest.raises(InputError, match="no checkpoint of this run"):
        find_checkpoint(alone, 9)
