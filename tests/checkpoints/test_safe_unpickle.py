"""Refuse files, shards and indexes that would run code."""

import pickle
from argparse import Namespace

import pytest
import torch
from torch.distributed import checkpoint as sharded

from cola_lightning.checkpoints import check_no_code, read
from cola_lightning.errors import InputError


class Evil:
    """An object that makes a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


@pytest.fixture
def shards(tmp_path):
    """Write a sharded checkpoint as FSDP2 does."""
    folder = tmp_path / "shards.ckpt"
    state = {"state_dict": {"network.w": torch.arange(6.0)}, "optimizer_0": {"param_groups": [{"lr": 0.1}]}}
    sharded.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 3, "hyper_parameters": {"rank": 4}}, folder / "meta.pt")
    return folder


def test_a_file_that_would_run_code_is_refused_unopened(tmp_path):
    torch.save({"state_dict": {}, "callbacks": Evil(tmp_path / "trace")}, tmp_path / "evil.ckpt")
    for open_it in (check_no_code, read):
        with pytest.raises(InputError, match=r"evil.ckpt asks to load _?io.open, which may run code"):
            open_it(tmp_path / "evil.ckpt")
    assert not (tmp_path / "trace").exists()


def test_even_a_harmless_class_is_refused(tmp_path):
    torch.save({"arguments": Namespace(lr=0.1)}, tmp_path / "old.ckpt")
    with pytest.raises(InputError, match=r"argparse\.Namespace"):
        check_no_code(tmp_path / "old.ckpt")


def test_shards_are_read(shards):
    check_no_code(shards)
    checkpoint = read(shards)
    assert checkpoint.weights.keys() == {"w"}
    assert torch.equal(checkpoint.weights["w"], torch.arange(6.0))
    assert (checkpoint.step, checkpoint.hyper_parameters) == (3, {"rank": 4})


def test_an_index_that_would_run_code_is_refused_unopened(shards, tmp_path):
    (shards / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "trace")))
    with pytest.raises(InputError, match=r"\.metadata asks to load _?io.open"):
        read(shards)
    assert not (tmp_path / "trace").exists()


def test_a_shard_that_would_run_code_is_refused_unopened(tmp_path):
    """Shards hold pickles of data other than tensors."""
    folder = tmp_path / "shards.ckpt"
    sharded.save({"state_dict": {"network.w": torch.ones(2)}, "x": Evil(tmp_path / "trace")}, checkpoint_id=folder,
                 no_dist=True)  # fmt: skip
    (tmp_path / "trace").unlink(missing_ok=True)
    torch.save({}, folder / "meta.pt")
    with pytest.raises(InputError, match=r"\(x\) asks to load _?io.open"):
        check_no_code(folder)
    assert not (tmp_path / "trace").exists()


def test_a_truncated_index_is_reported(shards):
    index = shards / ".metadata"
    index.write_bytes(index.read_bytes()[:50])
    with pytest.raises(InputError, match=r"\.metadata is not a readable index"):
        read(shards)
