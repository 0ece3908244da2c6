"""Call the command line in this process. ``tests/test_readme.py`` calls it in processes of its own."""

import json
import math
import os
import re
import shutil
from importlib.util import find_spec

import lightning as L
import pytest
import rich
import torch
import yaml
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import FileSystemReader

from cola_lightning.cli.app import main


def curve(run_dir, tag):
    events = EventAccumulator(str(run_dir)).Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """Train a run of six steps, and return its directory."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    main(["fit", *tiny_run, f"--run_dir={run_dir}"])
    return run_dir


def test_a_run_leaves_events_checkpoints_and_its_configuration(finished):
    assert set(curve(finished, "train/loss")) == set(range(6))
    for tag in ("train/gradient_norm", "train/learning_rate", "train/tokens", "train/tokens_per_second"):
        assert len(curve(finished, tag)) == 6
    assert len(curve(finished, "val/perplexity")) == len(curve(finished, "val/perplexity_as_published")) == 2
    assert curve(finished, "train/tokens")[5] == 6 * 4 * 31
    assert curve(finished, "train/learning_rate")[1] == pytest.approx(0.0005)
    assert (finished / "checkpoints" / "last.ckpt").is_file()
    assert yaml.safe_load((finished / "config.yaml").read_text())["model"]["projection"]["init_args"] == {"rank": 8}


class PlainDataOnly(L.Callback):
    """Check at the start of a command that no library can unpickle anything else."""

    def setup(self, trainer, pl_module, stage):
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        assert FileSystemReader.read_metadata.__module__ == "cola_lightning.private_apis.torch"
        print("guarded")


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_command_loads_plain_data_only(command, finished, tiny_run, tmp_path, capsys):
    more = ["--trainer.fast_dev_run=1", "--trainer.callbacks+=tests.cli.test_app.PlainDataOnly"]
    main([command, *tiny_run, *more, f"--run_dir={tmp_path / 'run'}"])
    assert "guarded" in capsys.readouterr().out
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_checkpoint_is_plain_data(finished):
    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["projection"]["class_path"] == "cola_lightning.methods.CoLA"
    assert checkpoint["global_step"] == 6


@pytest.mark.slow
def test_resuming_in_place_gives_the_unbroken_curve(finished, tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    half = ["--trainer.limit_train_batches=3", "--trainer.max_epochs=1", "--checkpoint.every_n_train_steps=1"]
    main(["fit", *[flag for flag in tiny_run if "every_n_train" not in flag], *half, f"--run_dir={run_dir}"])
    main(["fit", *tiny_run, f"--run_dir={run_dir}", "--ckpt_path=last"])
    assert curve(run_dir, "train/loss") == curve(finished, "train/loss")
    assert curve(run_dir, "train/tokens") == curve(finished, "train/tokens")


def test_a_finished_run_goes_on_with_more_steps(finished, tiny_run, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    flags = [flag for flag in tiny_run if "max_steps" not in flag]
    main(["fit", *flags, f"--run_dir={tmp_path / 'run'}", "--ckpt_path=last", "--trainer.max_steps=9"])
    losses = curve(tmp_path / "run", "train/loss")
    assert list(losses) == list(range(9))
    assert curve(tmp_path / "run", "train/tokens")[8] == 9 * 4 * 31


@pytest.mark.slow
def test_the_line_that_started_a_run_goes_on_with_it(tiny_run, tmp_path, capsys, recwarn):
    """The line sets an argument of the default schedule before it names another, as a flag after a config does."""
    line = ["fit", *tiny_run, f"--run_dir={tmp_path / 'run'}", "--ckpt_path=last", "--model.optimizer.lr=0.004"]
    schedule = "--model.schedule=CosineAnnealingLR"
    main([*line, schedule])
    main([*line, schedule, "--trainer.max_steps=8"])
    expected = [0.002 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    expected += [0.002 * (1 + math.cos(math.pi * step / 8)) for step in (6, 7)]
    assert list(curve(tmp_path / "run", "train/learning_rate").values()) == pytest.approx(expected, abs=1e-9)
    main([*line, "--trainer.max_steps=9", "--model.optimizer.lr=0.2"])
    assert curve(tmp_path / "run", "train/learning_rate")[8] == pytest.approx(
        0.1 * (1 + math.cos(math.pi * 8 / 9)), rel=1e-6
    )
    said = [str(warning.message) for warning in recwarn if "--model." in str(warning.message)]
    assert any("--model.schedule.warmup_steps is left out" in line for line in said)
    assert any("--model.optimizer.lr is 0.2 now; in" in line and line.endswith("it was 0.004") for line in said)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([*line, "--model.optimizer=SGD", "--trainer.max_steps=10"])
    assert "holds the state of torch.optim.AdamW; go on with that one" in capsys.readouterr().err


def test_a_second_run_in_the_same_place_is_refused(finished, tiny_run, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *tiny_run, f"--run_dir={finished}"])
    assert f"error: {finished} holds a run already; go on with it by --ckpt_path last" in capsys.readouterr().err


@pytest.mark.slow
def test_options_that_were_not_typed_come_from_the_checkpoint(finished, tiny_run, capsys, recwarn):
    data = [flag for flag in tiny_run if flag.startswith("--data") or flag.startswith("--trainer.enable")]
    checkpoint = finished / "checkpoints" / "last.ckpt"
    main(["validate", *data, "--trainer.accelerator=cpu", f"--ckpt_path={checkpoint}"])
    shown = capsys.readouterr().out
    assert f"{curve(finished, 'val/perplexity')[5]:.4f}"[:6] in shown
    main(["fit", *tiny_run, "--model.rope_theta=5000", f"--ckpt_path={checkpoint}", "--trainer.logger=false",
          "--trainer.max_steps=7", f"--checkpoint.dirpath={finished / 'other'}"])  # fmt: skip
    assert any("--model.rope_theta is 5000.0 now" in str(warning.message) for warning in recwarn)
    other = torch.load(finished / "other" / "last.ckpt", weights_only=True)
    assert other["hyper_parameters"]["rope_theta"] == 5000
    shutil.rmtree(finished / "other")


@pytest.mark.slow
def test_test_and_predict_run(finished, tiny_run, tmp_path, capsys):
    checkpoint = f"--ckpt_path={finished / 'checkpoints' / 'last.ckpt'}"
    main(["test", *tiny_run, checkpoint])
    assert "test/perplexity_as_published" in capsys.readouterr().out
    main(["predict", *tiny_run, checkpoint, f"--run_dir={tmp_path / 'run'}"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(len(rows)))
    loss = sum(row["tokens"] * math.log(row["perplexity"]) for row in rows) / sum(row["tokens"] for row in rows)
    assert math.exp(loss) == pytest.approx(curve(finished, "val/perplexity")[5], rel=1e-4)


@pytest.mark.slow
def test_printed_configuration_runs_as_it_is(finished, tiny_run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *tiny_run, f"--run_dir={tmp_path / 'run'}", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    main(["fit", f"--config={tmp_path / 'printed.yaml'}"])
    assert curve(tmp_path / "run", "train/loss") == curve(finished, "train/loss")


def printed(capsys, *flags):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *flags, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_parts_are_swapped_and_set_from_the_shell(tiny_run, capsys):
    settings = printed(
        capsys, *tiny_run, "--model.num_hidden_layers=4", "--model.projection.rank=5", "--model.optimizer=SGD",
        "--model.optimizer.lr=0.5", "--model.schedule.min_ratio=0.2", "--trainer.callbacks+=CoLAM",
        "--trainer.callbacks.keep=latents",
    )  # fmt: skip
    assert settings["model"]["num_hidden_layers"] == 4
    assert settings["model"]["projection"]["init_args"] == {"rank": 5}
    assert settings["model"]["optimizer"]["class_path"] == "torch.optim.SGD"
    assert settings["model"]["optimizer"]["init_args"]["lr"] == 0.5
    assert settings["trainer"]["callbacks"][0]["init_args"]["keep"] == "latents"


def test_the_bar_counts_steps_and_shows_loss_and_speed(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(rich, "_console", Console(force_terminal=True, width=200))  # of the whole process
    flags = [flag for flag in tiny_run if "progress_bar" not in flag]
    main(["fit", *flags, f"--run_dir={tmp_path / 'run'}"])
    shown = capsys.readouterr().out
    assert "Epoch" not in shown
    for part in ("Training", "6/6", "loss:", "tok/s:", "val/perplexity:"):
        assert part in shown


def test_files_build_on_files(tiny_run, tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    files = {
        "base.yaml": {"trainer": {"max_steps": 5, "callbacks": [{"class_path": "BaselinePerplexity"}]},
                      "model": {"hidden_size": 64, "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}}},
        "extra.yaml": {"model": {"hidden_size": 96}},
        "deep/run.yaml": {"config": ["../base.yaml", "../extra.yaml"],
                          "trainer": {"callbacks+": [{"class_path": "CoLAM"}]},
                          "model": {"optimizer": {"init_args": {"momentum": 0.5}}}},
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(yaml.safe_dump(content))
    flags = [flag for flag in tiny_run if flag.startswith("--data")]
    settings = printed(capsys, *flags, f"--config={tmp_path / 'deep' / 'run.yaml'}", "--trainer.max_steps=9")
    assert settings["trainer"]["max_steps"] == 9
    assert [item["class_path"].rsplit(".")[-1] for item in settings["trainer"]["callbacks"]] == [
        "BaselinePerplexity",
        "CoLAM",
    ]
    assert settings["model"]["hidden_size"] == 96
    assert settings["model"]["optimizer"]["init_args"]["lr"] == 0.1
    assert settings["model"]["optimizer"]["init_args"]["momentum"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("config: gone.yaml", "builds on gone.yaml, which is not in"),
        ("config: run.yaml", "run.yaml builds on itself"),
        ("trainer: {max_stepz: 3}", "--trainer.max_stepz is not an option"),
        ("trainer: {max_steps: soon}", "--trainer.max_steps is soon; it must be a whole number"),
        ("trainer: [", "run.yaml is not YAML"),
        ("hello", "run.yaml holds no settings"),
    ],
)
def test_bad_files_are_named(content, message, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main(["fit", f"--config={tmp_path / 'run.yaml'}"])
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.num_attention_heads=5"], "num_attention_heads 5 does not divide hidden_size 32"),
        (["--model.projection.rank=0"], "rank 0 does not fit"),
        (["--model.vocab_size=200"], "has 300 ids, but the embedding has only 200 rows"),
        (["--data.sequence_length=4096"], "sequence_length 4096 is beyond --model.max_position_embeddings 2048"),
        (["--data.paths=[/nowhere]"], "file at '/nowhere'"),
        (["--data.global_batch_size=6"], "the nearest that are: 4 and 8"),
        (["--model.projection=FullRank", "--trainer.callbacks+=CoLAM"], "q_proj is FullRank"),
    ],
)
def test_bad_input_gets_one_line_before_training(flags, message, tiny_run, tmp_path, capsys):
    rank = [] if "--model.projection=FullRank" not in flags else ["--model.projection.rank=8"]
    usual = [flag for flag in tiny_run if not flag.startswith(tuple(f.split("=")[0] for f in [*flags, *rank]))]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *usual, *flags, f"--run_dir={tmp_path / 'run'}"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(
            ["--trainer.logger=WandbLogger"], "Requirement 'wandb",
            marks=pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed"),
        ),
        (["--trainer.callbacks+=LossGuard", "--trainer.callbacks.patience=0"], "patience is 0; it must be at least 1"),
    ],
)  # fmt: skip
def test_what_a_class_refuses_is_one_line_too(flags, message, tiny_run, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *tiny_run, *flags])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
