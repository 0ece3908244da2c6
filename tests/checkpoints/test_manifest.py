"""Find damaged checkpoints by their checksums, and the newest valid one."""

import errno
import json
import os
import shutil

import pytest
import torch

from cola_lightning.checkpoints import find_corruption
from cola_lightning.checkpoints.latest import LINK, latest_valid, written
from cola_lightning.checkpoints.manifest import MANIFEST, checksum, contents, write_manifest
from cola_lightning.errors import InputError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "step_00000001.ckpt"
    torch.save({"weights": torch.arange(1000.0), "step": 1}, path)
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "step_00000002.ckpt"
    (path / "checkpoint").mkdir(parents=True)
    (path / "latest").write_text("checkpoint")
    (path / "checkpoint" / "shard").write_bytes(bytes(range(256)) * 100)
    write_manifest(path, {name: checksum(path / name) for name in contents(path)})
    return path


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_whole_file_and_a_whole_folder_are_valid(file, folder):
    assert find_corruption(file) is None
    assert find_corruption(folder) is None
    assert set(json.loads((folder / MANIFEST).read_text())) == {"latest", "checkpoint/shard"}


def test_one_flipped_bit_of_a_tensor_is_found(file):
    flip(file, file.read_bytes().index(torch.tensor([500.0, 501.0]).numpy().tobytes()))
    assert torch.load(file, weights_only=True)["weights"][500] != 500  # torch does not check it
    assert "checksum of" in find_corruption(file)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_file_cut_short_is_found(file, kept):
    os.truncate(file, int(kept * file.stat().st_size))
    assert find_corruption(file) == "cut short, or no checkpoint at all"


def test_damage_to_a_folder_is_found(folder):
    shard = folder / "checkpoint" / "shard"
    flip(shard, 7000)
    assert find_corruption(folder) == "checksum of checkpoint/shard differs"
    os.truncate(shard, 7000)
    assert find_corruption(folder) == "checkpoint/shard has 7000 bytes of 25600"
    shard.unlink()
    assert find_corruption(folder) == "checkpoint/shard is missing"
    (folder / MANIFEST).unlink()
    assert find_corruption(folder) == "files.json is missing"


def test_the_newest_valid_checkpoint_is_found_and_corruption_is_reported(file, folder, tmp_path):
    os.utime(file, ns=(2**62, 2**62))  # a copy does not keep times
    assert written(tmp_path) == [folder, file]
    assert latest_valid(tmp_path) == folder
    (folder / "latest").unlink()
    with pytest.warns(UserWarning, match=r"step_00000002.ckpt is damaged \(latest is missing\)"):
        assert latest_valid(tmp_path) == file
    file.unlink()
    with pytest.warns(UserWarning, match="damaged"):
        assert latest_valid(tmp_path) is None


def test_a_checkpoint_beyond_the_link_comes_last(file, folder, tmp_path):
    (tmp_path / LINK).symlink_to(file.name)
    assert written(tmp_path) == [file, folder]


def test_files_of_other_callbacks_are_not_listed(file, tmp_path):
    for name in ("epoch=0-step=9.ckpt", "best.ckpt", "data-failed-step=9.ckpt", "step_9.ckpt.partial"):
        shutil.copy(file, tmp_path / name)
    assert written(tmp_path) == [file]


def test_a_last_ckpt_that_is_no_link_is_ordered_by_its_step(file, tmp_path):
    torch.save({"global_step": 5, "state_dict": {}, "loops": {}, "hyper_parameters": {}}, tmp_path / LINK)
    assert written(tmp_path) == [tmp_path / LINK, file]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(InputError, match=r"cannot be read .*Input/output error"):
        latest_valid(tmp_path, patience=0)


def test_damage_that_makes_the_check_itself_fail_is_reported(file, folder):
    content = bytearray(file.read_bytes())
    at = content.index(b"PK\x01\x02") + 8  # flags of the first entry of the zip's directory: now "encrypted"
    content[at] |= 1
    file.write_bytes(content)
    assert "cannot be checked" in find_corruption(file)
    for manifest in ("[]", "3", '{"latest": 5}', '{"latest": {"bytes": 1}}', "null"):
        (folder / MANIFEST).write_text(manifest)
        assert find_corruption(folder)
