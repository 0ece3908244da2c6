"""Lines that a run prints at its start, at logged steps, and at its end."""

import logging
import re

import pytest

from cola_lightning.cli.app import main
from cola_lightning.quiet import is_wanted
from tests.conftest import curve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("work_folder")]


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


def test_samples_and_baselines_are_in_the_log_file_too(fit, capsys):
    run = fit(
        "--trainer.callbacks+=BaselinePerplexity",
        "--trainer.callbacks+=Samples",
        "--trainer.callbacks.prompts=[the nation]",
        "--trainer.callbacks.max_new_tokens=4",
    )
    shown = capsys.readouterr().err.splitlines()
    kept = [line.split(" ", 1)[1] for line in (run / "train.log").read_text().splitlines()]
    for begin in (
        "Perplexity on ",
        "  uniform over",
        "  this model",
        "The model continues 'the nation':",
        "  the nation",
    ):
        (line,) = [line for line in kept if line.startswith(begin)]
        assert line in shown


@pytest.mark.parametrize(("command", "done"), [("validate", "validated"), ("test", "tested"), ("predict", "predicted")])
def test_a_measurement_tells_what_it_measures_and_what_it_found(command, done, fit, tiny_run, capsys):
    run = fit()
    before = (run / "train.log").read_text()
    capsys.readouterr()
    checkpoint = run / "checkpoints" / "last.ckpt"
    main([command, *tiny_run, f"--run_dir={run}", f"--ckpt_path={checkpoint}"])
    told = dict(line.split(None, 1) for line in capsys.readouterr().err.splitlines() if re.match(r"\w+ +\S", line))
    assert "2 layers, hidden size 32" in told["model"]
    assert told["devices"] == "1 x cpu, SingleDevice"
    assert told["weights"] == str(checkpoint)
    assert "steps" not in told
    assert "after 0:00:0" in told[done]
    if command == "validate":
        assert told[done].startswith(f"val/perplexity {curve(run, 'val/perplexity')[5]:,.4f}")
    if command == "predict":
        assert told["rows"] == str(run / "predictions.jsonl")
    assert (run / "train.log").read_text() == before


def test_a_terminals_lines_are_wrapped_and_the_files_are_not(fit, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    run = fit()
    shown = capsys.readouterr().err.splitlines()
    model = next(number for number, line in enumerate(shown) if line.startswith("model "))
    assert len(shown[model]) <= 50
    assert shown[model + 1].startswith("           ")
    assert any("vocabulary 300" in line for line in (run / "train.log").read_text().splitlines() if " model " in line)
