"""Check the help of the program and of its commands, and what it imports."""

import re
import subprocess
import sys

import pytest

from cola_lightning.cli import app
from cola_lightning.cli.app import GROUPS, TRAINER_COMMANDS, main, own_commands
from cola_lightning.cli.run_parser import COMMON_OPTIONS
from tests.conftest import REPOSITORY

LIGHT = ["benchmark", "completion", "estimate", "evaluate", "export", "generate", "schema"]
"""Commands with a parser of their own, which needs no torch. The others' parsers read a function's signature."""


def shown(capsys, *args):
    with pytest.raises(SystemExit, match="0"):
        main(list(args))
    return capsys.readouterr().out


def test_the_programs_help_lists_each_command_once_under_a_group(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    files = {path.stem for path in (REPOSITORY / "cola_lightning/cli/commands").glob("*.py")} - {"__init__"}
    listed = re.findall(r"^  (\w+) +[A-Z].*\.$", text, re.M)
    assert sorted(listed) == sorted(files | set(TRAINER_COMMANDS))
    assert re.findall(r"^(\w+):$", text, re.M) == [*GROUPS, "Examples"]
    assert {group for group, _ in own_commands().values()} <= set(GROUPS)
    assert text.count("\n  cola_lightning ") == 3


def test_examples_name_files_of_the_repository(capsys):
    main(["--help"])
    text = capsys.readouterr().out + "".join(shown(capsys, command, "--help") for command in LIGHT)
    named = re.findall(r"configs/\S+\.yaml", text)
    assert len(named) > 3
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []


@pytest.mark.parametrize("command", [*own_commands(), "fit", "validate"])
def test_a_commands_help_begins_with_an_example(command, capsys):
    first = shown(capsys, command, "--help").splitlines()[0]
    assert first.startswith(f"Example: cola_lightning {command} ")


def test_the_help_of_fit_begins_with_twenty_options_that_exist(capsys):
    text = shown(capsys, "fit", "--help")
    begin, _, rest = text.partition("All options follow.")
    names = re.findall(r"^  (--[\w.]+)", begin, re.M)
    assert len(names) == len(COMMON_OPTIONS) == 20
    made_by_a_class = {"--data.batch_size"}
    assert [name for name in names if not re.search(rf"{re.escape(name)}\b", rest)] == sorted(made_by_a_class)


def test_adding_a_file_adds_a_command(tmp_path, monkeypatch):
    (tmp_path / "commands").mkdir()
    (tmp_path / "commands" / "count.py").write_text('"""Count."""\n\nGROUP = "Look"\n')
    monkeypatch.setattr(app, "__file__", str(tmp_path / "app.py"))
    assert own_commands() == {"count": ("Look", "Count.")}


def test_help_of_the_program_and_of_light_commands_imports_nothing_heavy():
    """Check imports and memory in place of seconds, which depend on the machine."""
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from cola_lightning.cli.app import main\n"
        "main(['--help'])\n"
        f"for command in {LIGHT}:\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'lightning', 'transformers', 'numpy', 'jsonargparse'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "status = Path('/proc/self/status')\n"
        "if status.is_file(): assert int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) < 100 * 1024\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=REPOSITORY)
