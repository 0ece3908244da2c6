"""Type Lightning's own flags: each does what Lightning documents, or is refused in one line."""

import re
from functools import partial

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from cola_lightning.callbacks import LogLines, Throughput
from cola_lightning.callbacks.defaults import defaults_beside
from cola_lightning.cli.app import main
from cola_lightning.optim import WarmupCosine
from tests.conftest import curve, tiny_trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("work_folder")]


class Rows(L.Callback):
    """Keep the ids of all batches that were trained on."""

    seen: list[torch.Tensor] = []  # noqa: RUF012 read by the tests, which do not have the object

    def on_train_start(self, trainer, pl_module):
        self.seen.clear()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(batch["input_ids"].clone())


RECORD = f"--trainer.callbacks+={__name__}.Rows"
LOG = "--trainer.callbacks+=LearningRateMonitor"


# -- refused, or working ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.001"],
         "StochasticWeightAveraging averages over epochs, but this run is one epoch"),
        (["--trainer.callbacks+=EMAWeightAveraging", "--trainer.strategy=fsdp2"],
         "EMAWeightAveraging keeps a whole copy of the network, which FSDP2Strategy shards"),
        (["--model.projection=LoRA", "--model.projection.rank=8", "--trainer.callbacks+=ReLoRACallback",
          "--trainer.callbacks+=WeightAveraging"], "WeightAveraging averages weights over steps, but ReLoRACallback"),
        ([LOG, "--trainer.logger=false"], "`LearningRateMonitor` callback with `Trainer` that has no logger"),
        (["--trainer.plugins=AsyncCheckpointIO"], "AsyncCheckpointIO returns before a checkpoint is on the disk"),
        (["--trainer.callbacks+=cola_lightning.callbacks.Checkpoints"], "set --checkpoint.every_n_train_steps, keep"),
        (["--trainer.callbacks+=BatchSizeFinder"], "take 'cola_lightning estimate'"),
        (["--trainer.callbacks+=LearningRateFinder"], "LearningRateFinder sets an attribute lr"),
        (["--trainer.callbacks+=BackboneFinetuning"], "BackboneFinetuning is made for fine-tuning other networks"),
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=nothing"],
         "conditioned on metric `nothing` which is not available"),
        (["--model.optimizer=torch.optim.Muon"], "Muon only supports 2D parameters .* configs/method/muon.yaml does"),
        (["--model.optimizer=torch.optim.SparseAdam"], "SparseAdam takes sparse gradients"),
        (["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=-1"],
         "--model.optimizer: Invalid learning rate: -1.0"),
        (["--trainer.profiler=xla"], "torch_xla"),
        (["--trainer.val_check_interval=0"], "val_check_interval is 0; it must be at least 1; set --trainer.limit_val"),
        (["--trainer.check_val_every_n_epoch=0"], "check_val_every_n_epoch is 0; it must be at least 1"),
        (["--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches is 0; it must be at least 1"),
        (["--trainer.strategy=ddp_spawn"], "ddp_spawn is for notebooks"),
        (["--trainer.barebones=true"], "log_every_n_steps=1"),
        (["--ckpt_path=best"], "--ckpt_path best is not there; name a checkpoint, or the run's newest by"),
        (["--seed_everything=-1"], "--seed_everything is -1; it must lie between 0 and 4294967295"),
        ([f"--checkpoint.dirpath={__file__}"], "is a file; name a directory"),
        (["--trainer.default_root_dir=other"], "both say where a run's files go"),
    ],
)  # fmt: skip
def test_one_line_refuses_it(flags, message, refused):
    assert re.search(message, refused(*flags))


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:00:01:00"],
        ["--trainer.callbacks+=EMAWeightAveraging"],
        ["--trainer.fast_dev_run=true"],
        [LOG, "--trainer.profiler=simple", "--trainer.detect_anomaly=true", "--trainer.deterministic=warn"],
    ],
)
def test_a_run_with_these_flags_works(flags, fit):
    fit(*flags)


def test_without_checkpointing_nothing_is_saved_and_the_run_goes_to_its_end(fit):
    run = fit("--trainer.enable_checkpointing=false")
    assert set(curve(run, "train/loss")) == set(range(6))
    assert not (run / "checkpoints").exists()


def test_barebones_trains_without_logs_and_checkpoints(tiny_run, tmp_path):
    flags = [
        flag for flag in tiny_run if not flag.startswith(("--trainer.log", "--trainer.enable", "--trainer.num_sa"))
    ]
    main(["fit", *flags, f"--run_dir={tmp_path / 'run'}", "--trainer.barebones=true", RECORD])
    assert len(Rows.seen) == 6
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"config.yaml", "run.json", "tokenizer"}


def test_an_average_of_weights_is_what_is_saved_and_validated(fit):
    """With a decay of 1 the average keeps its first value, so the perplexity stays that of the untrained network."""
    run = fit("--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=1.0",
              "--trainer.callbacks.update_every_n_steps=1", "--trainer.log_every_n_steps=1")  # fmt: skip
    first, last = curve(run, "val/perplexity").values()
    assert first == last
    losses = list(curve(run, "train/loss").values())
    assert losses[-1] < losses[0]  # the network itself did learn


def test_a_run_with_averages_goes_on_as_if_unbroken_and_not_without_its_callback(fit, refused):
    flags = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.5"]
    whole = fit(*flags, folder="whole")
    half = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=1", "--trainer.limit_val_batches=0"]
    fit(*flags, *half)
    assert "name it again to go on" in refused("--ckpt_path=last")
    run = fit(*flags, "--ckpt_path=last")
    ends = [torch.load(each / "checkpoints" / "last.ckpt", weights_only=True) for each in (whole, run)]
    for kind in ("state_dict", "current_model_state"):
        assert all(torch.equal(weight, ends[1][kind][name]) for name, weight in ends[0][kind].items())


def test_a_default_callback_that_is_named_takes_the_place_of_the_default(fit):
    fit("--trainer.callbacks+=cola_lightning.callbacks.Throughput", "--trainer.callbacks.peak_tflops=1")
    named, other = Throughput(1.0), Rows()
    assert defaults_beside([named, other], [Throughput(), LogLines()])[0].__class__ is LogLines


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1), torch.optim.Adafactor, torch.optim.RAdam, torch.optim.NAdam,
        torch.optim.Rprop,
        torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adamax, torch.optim.ASGD,
    ],
    ids=lambda make: getattr(make, "func", make).__name__,
)  # fmt: skip
def test_optimizers_of_torch_train(optimizer):
    trainer, model, batches = tiny_trainer(steps=3)
    model.make_optimizer, model.make_schedule = optimizer, partial(WarmupCosine, warmup_steps=0)
    before = []
    model.on_fit_start = lambda: before.extend(p.detach().clone() for p in model.parameters())
    trainer.fit(model, DataLoader(batches, batch_size=None))
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# -- batches ----------------------------------------------------------------------------------------------------------


def test_overfit_batches_takes_the_same_batches_again_and_again(fit):
    fit("--trainer.overfit_batches=2", "--trainer.val_check_interval=1.0", RECORD)
    first, second = Rows.seen[:2]
    assert not torch.equal(first, second)
    assert all(torch.equal(batch, (first, second)[index % 2]) for index, batch in enumerate(Rows.seen))


def test_a_share_of_the_data_to_overfit_is_of_the_data_set_not_of_the_run(fit):
    fit("--trainer.overfit_batches=0.5", "--trainer.val_check_interval=1.0", "--trainer.max_steps=40", RECORD)
    distinct = {tuple(batch.flatten().tolist()) for batch in Rows.seen}
    assert 1 < len(distinct) < 40
    assert torch.equal(Rows.seen[0], Rows.seen[len(distinct)])


def test_a_loader_that_is_made_anew_each_epoch_goes_on_in_the_data(fit):
    """The batches are those of the run whose loader is made once."""
    fit(RECORD, folder="plain")
    plain = list(Rows.seen)
    fit("--trainer.limit_train_batches=3", "--trainer.reload_dataloaders_every_n_epochs=1", RECORD)
    assert len(Rows.seen) == len(plain) == 6
    assert all(torch.equal(batch, other) for batch, other in zip(Rows.seen, plain, strict=True))
