"""Cause faults in real processes of the real command line: no memory, a full disk, a damaged checkpoint.

At most the steps since the last checkpoint are lost, and the result stays the same. Other tests cover signals and lost
ranks (``training/test_preemption``) and crashes while writing (``callbacks/test_checkpoints``).
"""

import json
import os
import re
import resource
import subprocess
from pathlib import Path

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cola_lightning.callbacks import Checkpoints
from cola_lightning.callbacks.checkpoints import UnsavedError
from cola_lightning.checkpoints import find_corruption, lock, read
from cola_lightning.checkpoints.latest import LINK, latest_valid
from cola_lightning.cli.app import main
from cola_lightning.training.pending_validation import NOTE
from tests.conftest import loader, tiny_trainer
from tests.distributed.parity_run import train
from tests.processes import Run

pytestmark = pytest.mark.distributed

LENGTH = 12


class Greedy(L.Callback):
    """Limit memory from the sixth step on to 500 MB more than in use, with rows that need 60 GB."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 500 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            for name in batch:
                batch[name] = batch[name].repeat(20_000, 1)


class Filling(L.Callback):
    """Fill a disk after the third step to the last byte, and free it again after the ninth."""

    def __init__(self, disk: str) -> None:
        self.filler = Path(disk) / "filler"

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            with self.filler.open("wb", buffering=0) as file:
                try:
                    while file.write(b"x" * 512):
                        pass
                except OSError:
                    print("The disk is full", flush=True)
        elif trainer.global_step == 9:
            self.filler.unlink()
        trainer.logger.experiment.add_text("long", "as a picture is " * 1000, trainer.global_step)
        trainer.logger.experiment.flush()  # TensorBoard does it every two minutes


@pytest.fixture
def start(tiny_run, tmp_path):
    """Return a function that starts a run in a directory, from its last checkpoint if there is one."""

    def started(folder: Path, *flags: str) -> Run:
        flags = (*tiny_run, f"--run_dir={folder}", "--ckpt_path=last", f"--trainer.max_steps={LENGTH}", *flags)
        return Run(main, ["fit", *flags], ranks=1, folder=tmp_path / "logs")

    return started


@pytest.fixture
def assert_nothing_lost(start, tmp_path):
    """Return a function that checks that a run has the weights of one without faults."""

    def same(folder: Path) -> None:
        start(tmp_path / "unbroken").done()
        ends = [read(place / "checkpoints" / "last.ckpt") for place in (folder, tmp_path / "unbroken")]
        assert [end.step for end in ends] == [LENGTH, LENGTH]
        assert all(torch.equal(weight, ends[1].weights[name]) for name, weight in ends[0].weights.items())

    return same


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name != NOTE)


def test_memory_that_runs_out_ends_a_run_with_advice_and_it_goes_on(start, assert_nothing_lost, tmp_path):
    folder = tmp_path / "run"
    run = start(folder, f"--trainer.callbacks+={__name__}.Greedy")
    assert run.wait() == [1], run.output()
    shown = run.logs[0].read_text()
    assert "error: can't allocate memory: you tried to allocate" in shown
    assert "Try, the cheapest first:\n  --model.loss_chunk_size 32" in shown
    assert "Traceback" not in shown
    assert checkpoints(folder) == ["last.ckpt", "step_00000002.ckpt", "step_00000004.ckpt"]
    start(folder).done()
    assert_nothing_lost(folder)


@pytest.mark.parametrize("harm", ["cut short", "altered"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(start, assert_nothing_lost, tmp_path, harm):
    folder = tmp_path / "run"
    start(folder).done()
    newest = folder / "checkpoints" / f"step_{LENGTH:08}.ckpt"
    if harm == "cut short":
        os.truncate(newest, newest.stat().st_size - 1000)
    else:  # one bit of a weight
        weight = read(newest).weights["model.layers.0.mlp.up_proj.A.weight"]
        content = bytearray(newest.read_bytes())
        content[content.index(weight.numpy().tobytes())] ^= 1
        newest.write_bytes(content)
    assert find_corruption(newest) is not None
    run = start(folder)
    run.done()
    shown = run.logs[0].read_text()
    assert f"{newest.name} is damaged" in shown
    assert re.search(rf"[Rr]estor.*step_{LENGTH - 2:08}\.ckpt", shown)
    assert find_corruption(newest) is None
    assert_nothing_lost(folder)


@pytest.fixture
def disk(tmp_path):
    """Return a function that makes a small disk with a number of bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def made(size: int) -> Path:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root; callbacks/test_checkpoints limits the size of files instead")
        return folder

    yield made
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_reported_and_the_run_goes_on(start, assert_nothing_lost, tmp_path, disk):
    """All files of the run are on the disk. Some events are lost, but not the later ones."""
    place = disk(3 * 2**20)
    folder = place / "run"
    run = start(folder, f"--trainer.callbacks+={__name__}.Filling", f"--trainer.callbacks.disk={place}")
    run.done()
    shown = run.logs[0].read_text()
    assert "The disk is full" in shown
    assert "step_00000004.ckpt could not be written" in shown
    assert "the newest checkpoint is" in shown
    assert "No space left on device); some are lost" in shown
    losses = EventAccumulator(str(folder)).Reload().Scalars("train/loss")
    assert [event.step for event in losses][:3] == [0, 1, 2]
    assert losses[-1].step == LENGTH - 1
    assert checkpoints(folder) == ["last.ckpt", "step_00000010.ckpt", "step_00000012.ckpt"]
    assert_nothing_lost(folder)


@pytest.mark.parametrize("strategy", ["fsdp2_sharded", "deepspeed_2", "deepspeed_3"])
def test_no_rank_waits_for_one_that_could_not_write_its_part(tmp_path, disk, strategy):
    """The disk has room for the checkpoint of step 10, but not for that of step 20 beside it."""
    Run(train, strategy, 2, str(tmp_path / "unbroken"), ranks=2, folder=tmp_path / "logs").done()
    size = sum(file.stat().st_size for file in (tmp_path / "unbroken" / "step_00000010.ckpt").rglob("*"))
    folder = disk(int(1.5 * size) + 2**16) / "run"
    run = Run(train, strategy, 2, str(folder), ranks=2, folder=tmp_path / "full")
    assert run.wait() == [1, 1], run.output()
    shown = run.logs[0].read_text()
    assert "step_00000020.ckpt could not be written: " in shown
    assert "step 20, the last of this run, is not on the disk" in shown
    assert sorted(path.name for path in folder.iterdir() if path.name != lock.NAME) == [LINK, "step_00000010.ckpt"]
    assert find_corruption(folder / LINK) is None


@pytest.mark.parametrize("strategy", ["fsdp2_sharded", "deepspeed_2"])
def test_a_checkpoint_is_whole_whoever_asks_for_it(tmp_path, strategy):
    """A data module and a ModelCheckpoint also ask for checkpoints. Lightning's own would have no manifest."""
    Run(train, strategy, 2, str(tmp_path / "run"), ranks=2, folder=tmp_path).done()
    asked = tmp_path / "run" / "asked-for.ckpt"
    assert find_corruption(asked) is None
    assert read(asked).step == read(tmp_path / "run" / LINK).step == 20


def test_where_there_is_room_for_two_the_oldest_goes_first(start, tmp_path, disk):
    """Three checkpoints never fit. Every step is saved, and there is always at least one checkpoint."""
    start(tmp_path / "unbroken").done()
    size = (tmp_path / "unbroken" / "checkpoints" / "last.ckpt").stat().st_size
    folder = tmp_path / "run"
    place = disk(int(2.5 * size))
    run = start(folder, f"--checkpoint.dirpath={place / 'checkpoints'}")
    run.done()
    shown = run.logs[0].read_text()
    assert "is full: step_00000002.ckpt is removed before a newer checkpoint is written" in shown
    assert "could not be written" not in shown
    assert read(place / "checkpoints" / LINK).step == LENGTH


SIZES = [0, 1, 4, 16, 64, 110, 130, 150, 190, 210, 230, 250, 290, 310, 330, 350, 400, 500, 700, 1000]


def fit_on_disks(places: list[str], log: str) -> None:
    """Train once on each disk, and write down how each run ended."""
    ends = []
    for place in places:
        callback = Checkpoints(2, dirpath=str(Path(place, "checkpoints")), minutes_at_end=0)
        run, model, data = tiny_trainer(callback, steps=6, enable_checkpointing=True)
        try:
            run.fit(model, loader(data))
            ends.append("well")
        except UnsavedError as error:
            ends.append(str(error))
    Path(log).write_text(json.dumps(ends))


def test_a_run_without_its_last_step_on_disk_fails_on_every_file_system(tmp_path):
    """Disks of twenty sizes in KiB (a checkpoint has about 50), one with few inodes, and one that is read-only."""
    options = [f"size={size}k" for size in SIZES[1:]] + ["size=4k,nr_inodes=1"]
    options += [f"nr_inodes={count}" for count in (2, 3, 4, 5, 6, 7)] + ["ro"]
    places = []
    try:
        for number, option in enumerate(options):
            place = tmp_path / str(number)
            place.mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(place)]
            if subprocess.run(mount, capture_output=True).returncode:
                pytest.skip("mounting small disks needs root")
            places.append(place)
        log = tmp_path / "ends.json"
        run = Run(fit_on_disks, [str(place) for place in places], str(log), ranks=1, folder=tmp_path / "logs")
        run.done()
        ends = json.loads(log.read_text())
        for option, place, end in zip(options, places, ends, strict=True):
            last = place / "checkpoints" / "step_00000006.ckpt"
            if end == "well":
                assert find_corruption(last) is None, option
                assert latest_valid(last.parent) == last, option
            else:
                assert not last.exists(), option
                assert "step 6, the last of this run, is not on the disk" in end
        assert 3 < ends.count("well") < len(ends) - 3
    finally:
        for place in places:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
