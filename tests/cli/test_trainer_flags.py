"""Type Lightning's own flags: each does what Lightning documents, or is refused in one line."""

import json
import logging
import re
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, Dataset, IterableDataset

from cola_lightning.callbacks import LogLines, Predictions, Throughput
from cola_lightning.callbacks.defaults import defaults_beside
from cola_lightning.cli.app import main
from cola_lightning.cli.trainer_flags import next_version
from cola_lightning.optim import WarmupCosine
from cola_lightning.quiet import is_wanted
from tests.conftest import tiny_trainer
from tests.processes import Run

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def fit(tiny_run, tmp_path):
    """Return a function that trains in ``run`` of the temporary folder, and returns that directory."""

    def run(*flags: str, folder: str = "run", command: str = "fit") -> Path:
        main([command, *tiny_run, f"--run_dir={tmp_path / folder}", *flags])
        return tmp_path / folder

    return run


@pytest.fixture
def refused(fit, capsys):
    """Return a function that gives the one line by which a run with these flags is refused."""

    def line(*flags: str, **options) -> str:
        with pytest.raises(SystemExit, match="2"):
            fit(*flags, **options)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        return errors[0]

    return line


def curve(run_dir, tag):
    events = EventAccumulator(str(run_dir)).Reload()
    return {event.step: event.value for event in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}


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


def test_a_run_dir_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "run").touch()
    assert "is a file; name a directory" in refused()


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


# -- everything of a run goes into its directory ----------------------------------------------------------------------


class Elsewhere(Logger):
    """Logger that writes to the working directory if it is given no other, like WandbLogger."""

    name = version = "elsewhere"

    def __init__(self, save_dir: str = "."):
        super().__init__()
        self._save_dir = save_dir

    @property
    def save_dir(self):
        return self._save_dir

    def log_metrics(self, metrics, step=None):
        with Path(self.save_dir, "metrics.txt").open("a") as file:
            file.write(f"{step} {metrics}\n")

    def log_hyperparams(self, *_, **__):
        pass


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.logger=false"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=../csv"],
        [f"--trainer.logger={__name__}.Elsewhere"],
    ],
)
def test_whatever_the_logger_everything_of_a_run_goes_into_run_dir(flags, fit, capsys):
    Path("config.yaml").write_text("mine")
    run = fit(*flags)
    assert [path.name for path in Path().iterdir()] == ["config.yaml"]
    assert Path("config.yaml").read_text() == "mine"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "run.json", "tokenizer", "checkpoints", "train.log"} <= names
    assert ("metrics.txt" in names) == ("Elsewhere" in flags[0])
    assert yaml.safe_load((run / "config.yaml").read_text())["run_dir"] == str(run)
    capsys.readouterr()
    main(["generate", str(run), "--prompt", "the", "--max_new_tokens", "2"])
    assert capsys.readouterr().out.startswith("the")


def test_a_run_without_name_and_logger_gets_a_directory_of_its_own(tiny_run):
    for number in (0, 1):
        main(["fit", *tiny_run, "--trainer.logger=false"])
        assert (Path("runs") / f"version_{number}" / "checkpoints" / "last.ckpt").is_file()
    assert [path.name for path in Path().iterdir()] == ["runs"]
    assert next_version(Path("runs")) == Path("runs/version_2")


def test_the_metrics_of_another_run_are_not_deleted(fit, refused):
    flags = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=csv", "--trainer.logger.version=mine"]
    fit(*flags)
    before = next(Path("csv").rglob("metrics.csv")).read_text()
    assert "CSVLogger would delete" in refused(*flags, folder="other")
    assert next(Path("csv").rglob("metrics.csv")).read_text() == before


# -- measuring --------------------------------------------------------------------------------------------------------


def test_measuring_writes_nothing_into_the_run_and_the_card_has_the_value_of_its_step(fit, capsys, tmp_path):
    run = fit()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    perplexity = curve(run, "val/perplexity")[5]
    for command in ("validate", "test"):
        for flags in ([f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"], []):
            fit(*flags, command=command)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    main(["export", str(run), str(tmp_path / "card")])
    assert f"| validation perplexity | {perplexity:,.2f} per token |" in (tmp_path / "card" / "README.md").read_text()
    main(["export", str(run / "checkpoints" / "step_00000004.ckpt"), str(tmp_path / "card4")])
    at_three = f"not recorded at this step; {curve(run, 'val/perplexity')[2]:,.2f} per token at step 3"
    assert at_three in (tmp_path / "card4" / "README.md").read_text()


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_untrained_network_is_reported(command, fit, recwarn):
    fit(command=command)
    assert any(f"The network is untrained: {command} was given no checkpoint" in str(each.message) for each in recwarn)


def test_a_trained_network_is_not_called_untrained(fit, recwarn):
    run = fit()
    fit(f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", command="validate")
    assert not any("untrained" in str(each.message) for each in recwarn)


# -- predictions ------------------------------------------------------------------------------------------------------


class Numbered(Dataset):
    """Data set of ten rows. In row i, i // 2 tokens are predicted."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        labels = torch.arange(1, 9)
        labels[index // 2 + 1 :] = -100
        return {"input_ids": torch.arange(1, 9), "labels": labels}


class Streamed(IterableDataset):
    def __iter__(self):
        return (Numbered()[index] for index in range(10))


def predict(folder: str, ranks: int, data: str) -> None:
    flags = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    trainer, model, _ = tiny_trainer(Predictions(), steps=1, default_root_dir=folder, **flags)
    data = {"map": DataLoader(Numbered(), 4), "stream": DataLoader(Streamed(), 4),
            "two": [DataLoader(Numbered(), 4), DataLoader(Numbered(), 3)]}[data]  # fmt: skip
    trainer.predict(model, data, return_predictions=False)


def read(folder: Path) -> list[dict]:
    files = sorted(folder.glob("predictions*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("data", ["map", "stream"])
def test_predictions_have_the_row_numbers_of_the_data(data, tmp_path):
    predict(str(tmp_path), 1, data)
    rows = read(tmp_path)
    assert [(row["row"], row["tokens"]) for row in rows] == [(index, index // 2) for index in range(10)]
    assert [row["perplexity"] is None for row in rows] == [True, True] + 8 * [False]


def test_of_several_loaders_each_row_says_which(tmp_path):
    predict(str(tmp_path), 1, "two")
    expected = [(loader, index) for loader in (0, 1) for index in range(10)]
    assert [(row["dataloader"], row["row"]) for row in read(tmp_path)] == expected


def test_on_two_ranks_each_row_is_there_once_under_its_number(tmp_path):
    Run(predict, str(tmp_path), 2, "map", ranks=2, folder=tmp_path / "logs").done()
    rows = read(tmp_path)
    assert sorted((row["row"], row["tokens"]) for row in rows) == [(index, index // 2) for index in range(10)]


# -- lines ------------------------------------------------------------------------------------------------------------


def test_off_a_terminal_there_is_a_line_for_each_logged_step_validation_and_checkpoint(fit, capsys):
    run = fit("--trainer.enable_progress_bar=true", "--trainer.log_every_n_steps=2")
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    kept = [line.split(" ", 1)[1] for line in (run / "train.log").read_text().splitlines()]
    assert shown == [line for line in kept if line.startswith("step ")]
    saved = [line for line in shown if "checkpoint" in line]
    assert saved == [f"step {step}/6 | checkpoint checkpoints/step_{step:08}.ckpt" for step in (2, 4, 6)]
    shown = [line for line in shown if line not in saved]
    assert [line.split(" | ")[0] for line in shown] == [f"step {step}/6" for step in (2, 3, 4, 6, 6)]
    losses, rates = curve(run, "train/loss"), curve(run, "train/learning_rate")
    steps = [line for line in shown if "validation" not in line]
    for line, step in zip(steps, (2, 4, 6), strict=True):
        assert f"| loss {losses[step - 1]:.4f} | learning rate {rates[step - 1]:.3g} | gradient norm " in line
        assert " | tokens/s " in line
        assert line.endswith(" left")
    assert steps[-1].endswith("| 0:00:00 left")
    assert shown[-1] == f"step 6/6 | validation perplexity {curve(run, 'val/perplexity')[5]:,.4f}"


def test_a_run_tells_at_its_start_what_it_is_and_at_its_end_what_it_reached(fit, capsys):
    run = fit()
    lines = capsys.readouterr().err.splitlines()
    told = dict(
        line.split(None, 1) for line in lines if re.match(r"(model|method|steps|run|reached|checkpoint) ", line)
    )
    rows, length = 4, 32
    assert "2 layers, hidden size 32, 4 heads, vocabulary 300" in told["model"]
    assert told["method"] == "CoLA of rank 8"
    assert told["steps"] == f"6, of {rows * length} tokens each: {6 * rows * length} tokens"
    assert told["run"] == str(run)
    perplexity = curve(run, "val/perplexity")[5]
    assert told["reached"].startswith("step 6 of 6 after 0:00:0")
    assert f"validation perplexity {perplexity:,.2f}" in told["reached"]
    assert told["checkpoint"] == str(run / "checkpoints" / "step_00000006.ckpt")
    kept = [line.split(" ", 1)[1] for line in (run / "train.log").read_text().splitlines()]
    assert [line for line in kept if line.startswith(("model ", "reached "))] == [
        line for line in lines if line.startswith(("model ", "reached "))
    ]


def test_messages_of_libraries_about_themselves_are_hidden_and_warnings_stay():
    def wanted(text: str) -> bool:
        return is_wanted(logging.LogRecord("lightning", logging.INFO, "", 0, text, (), None))

    assert not wanted("TPU available: False, using: 0 TPU cores")
    assert not wanted("💡 Tip: For seamless cloud logging and experiment tracking, try installing litlogger")
    assert wanted("GPU available but not used. You can set it by doing `Trainer(accelerator='gpu')`.")
    assert wanted("Stopping after step 3, because signal 15 was received")


def test_lines_can_be_turned_off(fit, capsys):
    run = fit("--trainer.callbacks+=LogLines", "--trainer.callbacks.terminal=false", "--trainer.callbacks.file=false")
    assert "step 6/6" not in capsys.readouterr().err
    assert not (run / "train.log").exists()
