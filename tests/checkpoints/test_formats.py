"""Read the checkpoint of a run, and refuse files that are none."""

import pytest
import torch

from cola_lightning.checkpoints import read
from cola_lightning.errors import InputError
from tests.conftest import loader, tiny_trainer


def test_a_file_gives_the_weights_and_the_hyper_parameters(tmp_path):
    trainer, model, batches = tiny_trainer(steps=2)
    trainer.fit(model, loader(batches))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = read(tmp_path / "a.ckpt")
    assert checkpoint.step == 2
    assert checkpoint.hyper_parameters["hidden_size"] == 16
    expected = model.network.state_dict()
    assert checkpoint.weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in checkpoint.weights.items())
    assert "optimizer_states" not in checkpoint.state


def test_a_file_that_is_no_checkpoint_is_reported(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.ckpt does not exist; name a checkpoint"):
        read(tmp_path / "nowhere.ckpt")
    with pytest.raises(InputError, match=r"is not a checkpoint"):
        read(tmp_path)
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(InputError, match=r"text.ckpt is not a whole checkpoint"):
        read(tmp_path / "text.ckpt")
    torch.save({"state_dict": {"layer.weight": torch.ones(1)}, "global_step": 1}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"other.ckpt holds no weights of a network of this package"):
        read(tmp_path / "other.ckpt")
