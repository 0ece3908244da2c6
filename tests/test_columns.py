import shlex
import sys
from pathlib import Path

import pytest

from cola_lightning.callbacks.run_summary import next_commands
from cola_lightning.columns import Command, in_columns


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_blocks_fit_the_terminal_and_commands_stay_in_one_line(width, tmp_path):
    commands = next_commands(tmp_path / "a_run_with_a_name", tmp_path)
    sizes = "264,224 parameters: 1 layers, hidden size 32, 2 heads, vocabulary 4,096"
    entries = [("model", sizes), *((name, Command(text)) for name, text in commands)]
    lines = in_columns(entries, width)
    for _, text in commands:
        assert sum(text in line for line in lines) == 1
    others = [line for line in lines if not any(text in line for _, text in commands)]
    assert max(map(len, others)) <= width
    assert " ".join(" ".join(others).split()).startswith(f"model {sizes}")


def test_a_shell_reads_the_commands_after_a_run_as_they_are_meant():
    run = Path("/a b/it's/рун")
    for _, command in next_commands(run, run):
        assert {str(run), str(run / "config.yaml")} & set(shlex.split(command))
    assert "curves" not in dict(next_commands(run, None))


def test_commands_begin_as_the_process_was_begun(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "-m", "cola_lightning", "fit"])
    commands = dict(next_commands(Path("run"), Path("run")))
    assert commands["curves"] == ".venv/bin/tensorboard --logdir run"
    assert commands["evaluate"] == ".venv/bin/python -m cola_lightning evaluate run --text notes.jsonl"
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", "cola_lightning", "fit"])
    assert dict(next_commands(Path("run"), Path("run")))["curves"] == "tensorboard --logdir run"
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "/usr/bin/cola_lightning", "fit"])
    assert dict(next_commands(Path("run"), None))["evaluate"] == "cola_lightning evaluate run --text notes.jsonl"


def test_without_a_terminal_nothing_is_wrapped():
    text = "word " * 100 + "end"
    assert in_columns([("data", text)], 0) == [f"data  {text}"]


def test_columns_fit_the_width():
    entries = [("--model.hidden_size N", "width of the network; all sizes are --model.NAME"), ("-c", "x " * 50)]
    for width in (40, 60, 100, 200):
        lines = in_columns(entries, width, indent="  ")
        assert max(map(len, lines)) <= width
        assert " ".join(" ".join(lines).split()) == " ".join(
            f"{name} {' '.join(text.split())}" for name, text in entries
        )
    assert len(in_columns(entries, 200)) == 2
    assert in_columns([("run", "/a/long/path/that/stays/whole")], 20) == ["run", "    /a/long/path/that/stays/whole"]
