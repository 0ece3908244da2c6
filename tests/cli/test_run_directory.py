"""Everything that a run writes is in its directory, and measuring it changes nothing there."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import Logger

from cola_lightning.cli.app import main
from cola_lightning.cli.trainer_flags import next_version
from tests.conftest import curve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("work_folder")]


def test_a_run_dir_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "run").touch()
    assert "is a file; name a directory" in refused()


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
    [said] = [str(each.message) for each in recwarn if "untrained" in str(each.message)]
    assert said.startswith(f"The network is untrained: {command} was given no checkpoint")


def test_a_trained_network_is_not_called_untrained(fit, recwarn):
    run = fit()
    fit(f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", command="validate")
    assert not any("untrained" in str(each.message) for each in recwarn)
