import json
import os

import pytest
import torch

from cola_lightning.checkpoints import damage
from cola_lightning.checkpoints.integrity import SEAL, checksum, contents, seal
from cola_lightning.checkpoints.newest import LINK, newest_whole, written


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
    seal(path, {name: checksum(path / name) for name in contents(path)})
    return path


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_whole_file_and_a_whole_folder(file, folder):
    assert damage(file) is None
    assert damage(folder) is None
    assert set(json.loads((folder / SEAL).read_text())) == {"latest", "checkpoint/shard"}


def test_one_flipped_bit_of_a_tensor_is_found(file):
    flip(file, file.read_bytes().index(torch.tensor([500.0, 501.0]).numpy().tobytes()))
    assert torch.load(file, weights_only=True)["weights"][500] != 500  # torch itself does not notice
    assert "checksum of" in damage(file)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_file_cut_short_is_found(file, kept):
    os.truncate(file, int(kept * file.stat().st_size))
    assert damage(file) == "cut short, or no checkpoint at all"


def test_damage_to_a_folder_is_found(folder):
    shard = folder / "checkpoint" / "shard"
    flip(shard, 7000)
    assert damage(folder) == "checksum of checkpoint/shard differs"
    os.truncate(shard, 7000)
    assert damage(folder) == "checkpoint/shard has 7000 bytes of 25600"
    shard.unlink()
    assert damage(folder) == "checkpoint/shard is missing"
    (folder / SEAL).unlink()
    assert damage(folder) == "files.json is missing"


def test_the_newest_whole_checkpoint_is_found_and_damage_is_told(file, folder, tmp_path):
    os.utime(file, ns=(1, 1))
    assert written(tmp_path) == [folder, file]
    assert newest_whole(tmp_path) == folder
    (folder / "latest").unlink()
    with pytest.warns(UserWarning, match=r"step_00000002.ckpt is damaged \(latest is missing\)"):
        assert newest_whole(tmp_path) == file
    file.unlink()
    with pytest.warns(UserWarning, match="damaged"):
        assert newest_whole(tmp_path) is None


def test_the_link_says_which_is_newest_where_times_do_not(file, folder, tmp_path):
    """As in a folder that was copied."""
    os.utime(file, ns=(1, 1))
    (tmp_path / LINK).symlink_to(file.name)
    assert newest_whole(tmp_path) == file
