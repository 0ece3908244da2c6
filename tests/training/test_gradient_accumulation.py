import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from cola_lightning.data import C4DataModule, TextDataModule
from cola_lightning.errors import InputError
from cola_lightning.training.gradient_accumulation import accumulate, rescale_progress
from tests.conftest import loader, tiny_trainer
from tests.distributed.accumulation_run import expected_gradients, gradients, model, rows
from tests.processes import Run


class Trainer:
    """What is asked of a trainer."""

    def __init__(self, replicas=None, interval=100, accumulate_grad_batches=1, callbacks=()):
        self.distributed_sampler_kwargs = replicas and {"num_replicas": replicas, "rank": 0}
        self.val_check_interval, self.accumulate_grad_batches = interval, accumulate_grad_batches
        self.callbacks = list(callbacks)


@pytest.mark.parametrize(("replicas", "micro_batches"), [(None, 16), (1, 16), (8, 2), (16, 1)])
def test_accumulates_to_the_stated_batch_and_validates_at_the_stated_steps(replicas, micro_batches):
    run = Trainer(replicas)
    for _ in range(2):  # a second stage changes nothing
        accumulate(run, 512, 32)
        assert run.accumulate_grad_batches == micro_batches
        assert run.val_check_interval == 100 * micro_batches


def test_micro_batches_stated_beside_an_equal_global_batch_leave_validations_where_they_are():
    run = Trainer(interval=4, accumulate_grad_batches=2)
    for _ in range(2):
        accumulate(run, 8, 4)
        assert (run.accumulate_grad_batches, run.val_check_interval) == (2, 8)


def test_micro_batches_that_contradict_the_global_batch_are_refused():
    with pytest.raises(
        InputError, match=r"accumulate_grad_batches 4 .*global_batch_size 8, which is 2 x .*batch_size 4"
    ):
        accumulate(Trainer(accumulate_grad_batches=4), 8, 4)
    with pytest.raises(InputError, match="GradientAccumulationScheduler changes the batch"):
        accumulate(Trainer(callbacks=[GradientAccumulationScheduler({0: 1, 4: 2})]), 8, 4)


def test_validations_of_a_real_run_come_at_the_stated_steps():
    """Against Lightning's own loop: 8 optimizer steps of 2 micro-batches, a validation every 4 steps."""
    run, model, batches = tiny_trainer(
        steps=8, limit_train_batches=16, val_check_interval=4, check_val_every_n_epoch=None, accumulate_grad_batches=2
    )
    data = L.LightningDataModule()
    data.global_batch_size, data.batch_size = 6, 3
    data.train_dataloader = lambda: loader(batches * 3)
    validated = []
    data.val_dataloader = lambda: loader(batches[:1])
    model.on_validation_end = lambda: validated.append(run.global_step)
    run.fit(model, datamodule=data)
    assert validated == [4, 8]


def test_a_validation_interval_as_a_share_of_the_run_is_left_alone():
    run = Trainer(interval=0.25)
    accumulate(run, 64, 32)
    assert run.val_check_interval == 0.25


def test_refuses_an_inexact_division_and_names_the_nearest_sizes():
    with pytest.raises(InputError, match=r"global_batch_size 500 .*batch_size 32 x 3 devices.*480 and 576"):
        accumulate(Trainer(3), 500, 32)
    with pytest.raises(InputError, match=r"global_batch_size 8 .*nearest that are: 32"):
        accumulate(Trainer(), 8, 32)


@pytest.mark.parametrize("make", [C4DataModule, lambda **settings: TextDataModule(["unused"], **settings)])
def test_a_batch_is_stated_in_rows_or_in_tokens(make):
    assert make(sequence_length=256, global_batch_tokens=131_072).global_batch_size == 512
    assert make(global_batch_size=512).global_batch_size == 512
    assert make().global_batch_size is None
    with pytest.raises(InputError, match=r"global_batch_tokens 1000 .*sequence_length 256; .*nearest.*: 768 and 1024"):
        make(sequence_length=256, global_batch_tokens=1000)
    with pytest.raises(InputError, match=r"global_batch_tokens 3 .*nearest that are: 256$"):
        make(sequence_length=256, global_batch_tokens=3)
    with pytest.raises(InputError, match=r"global_batch_size 512 and --data.global_batch_tokens 131072 both"):
        make(global_batch_size=512, global_batch_tokens=131_072)


# -- the loss of a step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [4, 2, 1])
def test_gradients_are_those_of_the_mean_over_the_tokens_of_the_step_however_it_is_cut(tmp_path, batch_size):
    """Of a last step with fewer micro-batches too. One row has nothing to learn, so one micro-batch has not either."""
    gradients(1, str(tmp_path), batch_size)
    found = torch.load(tmp_path / "0.pt", weights_only=True)
    torch.testing.assert_close(found, expected_gradients(), rtol=1e-10, atol=1e-14)


@pytest.mark.distributed
def test_two_ranks_have_the_gradients_of_one(tmp_path):
    Run(gradients, 2, str(tmp_path), 1, ranks=2, folder=tmp_path).done()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected_gradients(), rtol=1e-10, atol=1e-14)


def test_the_published_mean_of_means_can_be_chosen(tmp_path):
    """It depends on how the batch is cut, and on nothing else."""
    gradients(1, str(tmp_path), 2, mean_of_micro_batches=True)
    found = torch.load(tmp_path / "0.pt", weights_only=True)[:2]  # the last step has one micro-batch, of two in a step
    torch.testing.assert_close(found, expected_gradients(micro_batch=2)[:2], rtol=1e-10, atol=1e-14)
    assert (found - expected_gradients()[:2]).norm() > 0.01 * found.norm()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows())


def seen_by_training_step(loader, **settings) -> list[list[int]]:
    """``step_tokens`` of each micro-batch, by epoch."""
    epochs: list[list[int]] = []

    class Note(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            epochs.append([])

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            (number,) = batch["step_tokens"].unique().tolist()
            epochs[-1].append(number)

    L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=100, callbacks=[Note(), *settings.pop("callbacks", [])], **settings,
    ).fit(model(), loader)  # fmt: skip
    return epochs


FOURS = [8 + 1 + 2 + 0] * 4 + [15 + 3 + 7 + 1] * 4 + [4 + 11] * 2  # of ten rows, four to a step


@pytest.mark.parametrize("dataset", [rows(), Stream()], ids=["with a length", "without"])
def test_a_step_knows_its_tokens_at_its_first_micro_batch_in_every_epoch(dataset):
    """A loader without a length is fetched one batch ahead by Lightning."""
    loader = DataLoader(dataset, batch_size=1)
    assert seen_by_training_step(loader, accumulate_grad_batches=4, max_epochs=2) == [FOURS, FOURS]
    cut = [8 + 1 + 2 + 0] * 4 + [15 + 3] * 2
    assert seen_by_training_step(loader, accumulate_grad_batches=4, max_epochs=1, limit_train_batches=6) == [cut]


def test_a_batch_that_grows_during_the_run_is_counted_as_it_is_trained_on():
    grows = L.pytorch.callbacks.GradientAccumulationScheduler({0: 2, 1: 4})
    pairs = [9] * 2 + [2] * 2 + [18] * 2 + [8] * 2 + [15] * 2
    assert seen_by_training_step(DataLoader(rows(), batch_size=1), max_epochs=2, callbacks=[grows]) == [pairs, FOURS]


def test_tokens_are_counted_by_the_trainers_steps_if_the_loader_fetches_others():
    loader = DataLoader(rows(), batch_size=1)
    loader.batches_per_step = 3
    assert seen_by_training_step(loader, accumulate_grad_batches=4, max_epochs=1) == [FOURS]


def test_an_epoch_that_ends_within_a_step_is_refused_if_the_loader_fetches_whole_steps(corpus, tmp_path):
    data = TextDataModule([str(corpus)], vocab_size=300, sequence_length=32, batch_size=2, cache_dir=str(tmp_path))
    trainer = L.Trainer(
        accelerator="cpu", max_steps=6, accumulate_grad_batches=4, limit_train_batches=10, logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    with pytest.raises(InputError, match="an epoch of 10 batches is no multiple of the 4 that an optimizer step"):
        trainer.fit(model(vocab_size=300), datamodule=data)


def test_restored_progress_counts_in_the_micro_batches_of_this_run():
    """Three steps of two micro-batches, saved in the hook before the last was counted as completed."""
    counts = {"ready": 6, "started": 6, "processed": 6, "completed": 5}
    progress = {"current": dict(counts), "total": dict(counts), "is_last_batch": False}
    rescale_progress(progress, before=2, now=4)
    assert progress["current"] == {"ready": 12, "started": 12, "processed": 12, "completed": 11}
    assert progress["total"] == progress["current"]


class StopAtBatch(L.Callback):
    """Sets ``should_stop`` at a hook of the sixth micro-batch."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._stop)

    def _stop(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == 6:
            trainer.should_stop = True


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end", "on_validation_end"])
def test_a_stop_in_the_middle_of_a_step_comes_when_the_step_is_finished(hook):
    """Batches 5 to 8 are the second step of four: all of them are learnt from, and none is taken beyond."""
    validation = {"val_check_interval": 2} if hook == "on_validation_end" else {"limit_val_batches": 0}
    settings = {"accumulate_grad_batches": 4, "limit_train_batches": 12} | validation
    stopped, module, batches = tiny_trainer(StopAtBatch(hook), steps=3, **settings)
    stopped.fit(module, loader(2 * batches), loader(batches[:1]))
    whole, other, _ = tiny_trainer(steps=2, **settings)
    whole.fit(other, loader(2 * batches), loader(batches[:1]))
    assert stopped.global_step == whole.global_step == 2
    assert stopped.fit_loop.epoch_loop.batch_progress.total.ready == 8
    assert stopped.should_stop
    assert all(torch.equal(one, two) for one, two in zip(module.parameters(), other.parameters(), strict=True))
