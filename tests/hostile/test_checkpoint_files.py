"""Refuse files of checkpoints that hold pickled code, leave their folder, or claim more data than they hold."""

import os
import pickle
import shutil
from zipfile import ZIP_DEFLATED, ZipFile

import lightning.pytorch.strategies.fsdp
import pytest
import torch
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint import CheckpointException

from cola_lightning.checkpoints import check_no_code, plain_data_only, read
from cola_lightning.checkpoints.manifest import checksum, contents, write_manifest
from cola_lightning.errors import InputError
from tests.hostile.conftest import Evil, evil_file
from tests.hostile.test_checkpoints import refused

pytestmark = pytest.mark.slow


LOADERS = {
    "torch.load": lambda path: torch.load(path, weights_only=False),
    "Lightning's FSDP": lambda path: lightning.pytorch.strategies.fsdp._lazy_load(path),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_no_loader_of_a_library_unpickles(loader, trace, tmp_path, monkeypatch):
    """The loaders are safe without an earlier check, because a file could be replaced after the check."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = evil_file(tmp_path, trace)
    with plain_data_only(), pytest.raises(pickle.UnpicklingError, match="mkdir"):
        LOADERS[loader](path)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards.ckpt"
    state = {"state_dict": {"network.w": torch.arange(6.0)}, "optimizer_0": {"lr": 0.1}}
    sharded.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 3, "hyper_parameters": {}}, folder / "meta.pt")
    return folder


def test_torch_reads_the_index_without_pickle(shards, trace):
    (shards / ".metadata").write_bytes(pickle.dumps(Evil(trace)))
    with plain_data_only(), pytest.raises(CheckpointException) as stop:
        sharded.load({"state_dict": {"network.w": torch.zeros(6)}}, checkpoint_id=shards, no_dist=True)
    assert ".metadata asks to load posix.mkdir" in str(stop.value.failures[0][0])


def test_torch_does_not_unpickle_data_other_than_tensors(tmp_path, trace):
    folder = tmp_path / "bytes.ckpt"
    sharded.save({"x": Evil(trace)}, checkpoint_id=folder, no_dist=True)
    if trace.exists():
        trace.rmdir()  # saving copies the object, which runs its code
    with plain_data_only(), pytest.raises(CheckpointException) as stop:
        sharded.load({"x": None}, checkpoint_id=folder, no_dist=True)
    assert "GLOBAL posix.mkdir" in str(stop.value.failures[0][0])


@pytest.mark.parametrize("kind", ["file", "folder", "index"])
def test_a_link_that_leaves_the_folder_is_refused(shards, tmp_path, trace, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    evil_file(elsewhere, trace).rename(elsewhere / "evil_states.pt")
    match kind:
        case "file":
            (shards / "more.pt").symlink_to(elsewhere / "evil_states.pt")
        case "folder":
            (shards / "checkpoint").symlink_to(elsewhere)
        case "index":
            shutil.move(shards / ".metadata", elsewhere / ".metadata")
            (shards / ".metadata").symlink_to(elsewhere / ".metadata")
    with pytest.raises(InputError, match=r"is a link to .*, outside of the checkpoint"):
        check_no_code(shards)


def test_a_link_to_a_folder_in_the_checkpoint_is_refused(shards):
    (shards / "inner").mkdir()
    (shards / "checkpoint").symlink_to("inner")
    with pytest.raises(InputError, match="is a link to a folder, which no strategy writes"):
        check_no_code(shards)


def test_a_link_to_a_file_in_the_checkpoint_is_followed(shards):
    (shards / "kept.pt").symlink_to("meta.pt")
    check_no_code(shards)


@pytest.mark.parametrize("place", ["../meta.pt", "/etc/passwd", "inner/__0_0.distcp"])
def test_an_index_that_points_outside_is_refused(shards, place):
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = place
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="outside of the checkpoint"):
        check_no_code(shards)


def test_an_index_that_claims_too_much_data_is_refused(shards):
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    metadata.state_dict_metadata["state_dict.network.w"].size = torch.Size([10**15])
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    for look in (check_no_code, read):
        with pytest.raises(InputError, match=r"claims 4,000,000,000,000,000 bytes of tensors, but the folder holds"):
            look(shards)


@pytest.mark.parametrize("kind", ["packed", "twice"])
def test_an_archive_that_torch_would_not_write_is_refused(tmp_path, kind):
    path = tmp_path / "a.ckpt"
    torch.save({"w": torch.zeros(10)}, tmp_path / "whole.ckpt")
    with ZipFile(tmp_path / "whole.ckpt") as whole, ZipFile(path, "w") as archive:
        for part in whole.namelist():
            archive.writestr(part, whole.read(part), ZIP_DEFLATED if kind == "packed" else None)
        if kind == "packed":  # a gigabyte in a megabyte
            archive.writestr("whole/data/9", bytes(2**26), ZIP_DEFLATED)
        else:
            archive.writestr("whole/data.pkl", b"other")
    with pytest.raises(InputError, match="is packed" if kind == "packed" else "two parts of one name"):
        check_no_code(path)


def test_a_linked_folder_of_deepspeed_is_refused_under_validate(shards, tmp_path, trace, tiny_run, capsys):
    folder = tmp_path / "deepspeed.ckpt"
    (folder / "real").mkdir(parents=True)
    evil_file(folder / "real", trace).rename(folder / "real" / "mp_rank_00_model_states.pt")
    (folder / "checkpoint").symlink_to("real")
    (folder / "latest").write_text("checkpoint")
    write_manifest(folder, {name: checksum(folder / name) for name in contents(folder)})
    assert "link to a folder" in refused("validate", folder, tiny_run, capsys)
