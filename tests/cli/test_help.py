"""Check the help of the program and of its commands, and what it imports."""

import importlib
import re
import subprocess
import sys
from contextlib import suppress

import pytest

from cola_lightning.cli import app
from cola_lightning.cli.app import GROUPS, TRAINER_COMMANDS, main, own_commands
from cola_lightning.cli.help_pages import COMMON_OPTIONS
from cola_lightning.cli.parser import function_parser
from cola_lightning.private_apis.jsonargparse import options_of
from tests.conftest import REPOSITORY


def shown(capsys, *args):
    with suppress(SystemExit):
        main(list(args))
    return capsys.readouterr().out


def test_the_programs_help_lists_each_command_once_under_a_group(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
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
    text = capsys.readouterr().out + "".join(shown(capsys, command, "--help") for command in own_commands())
    named = re.findall(r"configs/\S+\.yaml", text)
    assert len(named) > 3
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []


@pytest.mark.parametrize("command", [*own_commands(), "fit", "validate"])
def test_a_commands_help_begins_with_an_example(command, capsys):
    first = shown(capsys, command, "--help").splitlines()[0]
    assert first.startswith(f"Example: cola_lightning {command} ")


def test_the_full_help_of_fit_begins_with_twenty_options_that_exist(capsys):
    text = shown(capsys, "fit", "--help=all")
    begin, _, rest = text.partition("All options follow.")
    names = re.findall(r"^  (--[\w.]+)", begin, re.M)
    assert len(names) == len(COMMON_OPTIONS) == 20
    made_by_a_class = {"--data.batch_size"}
    assert [name for name in names if not re.search(rf"{re.escape(name)}\b", rest)] == sorted(made_by_a_class)
    assert text == shown(capsys, "fit", "--help", "all")


def test_the_quick_help_of_fit_has_the_same_options_and_says_where_the_rest_is(capsys):
    text = shown(capsys, "fit", "--config=a.yaml", "--help")
    assert re.findall(r"^  (--[\w.]+)", text, re.M) == [name.split()[0].rstrip("+") for name in COMMON_OPTIONS]
    assert "cola_lightning fit --help=all" in text


def test_another_topic_of_help_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--help=optimizer"])
    assert "--help=optimizer is unknown; --help shows the options that are used most" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("prepare", "cola_lightning.data.prepare"),
        ("factorize", "cola_lightning.inference.factorize"),
        ("compare", "cola_lightning.compare.sweep"),
    ],
)
def test_help_that_is_read_from_the_source_has_the_options_of_the_parser(command, function, capsys):
    """jsonargparse reads the same function after importing it."""
    module = importlib.import_module(f"cola_lightning.cli.commands.{command}")
    skip = getattr(module, "NOT_TYPED", ())
    made = getattr(importlib.import_module(function), command)
    parser = function_parser(made, command, "", command == "factorize", skip)
    page = module.help_page().parser
    shown_options = {option: action for action in page._actions for option in action.option_strings or [action.dest]}
    parsed = {option: action for action in parser._actions for option in action.option_strings or [action.dest]}
    inner = re.compile(r".*(\+|\.help)$|--source$")  # a list's end, a class's page, a file with a source
    assert {option for option in parsed if not inner.fullmatch(option)} == set(shown_options)
    assert set(options_of(parser)) >= {option for option in shown_options if option.startswith("--")}
    for option in shown_options.keys() - {"-h", "--help", "-c", "--config", "--print_config"}:
        ours, theirs = shown_options[option].help.replace("%%", "%"), parsed[option]
        assert " ".join(theirs.help.split()) in ours
        assert len(theirs.help) > 10
        if isinstance(theirs.default, int | float | str):
            assert f"default: {theirs.default};" in ours


def test_adding_a_file_adds_a_command(tmp_path, monkeypatch):
    (tmp_path / "commands").mkdir()
    (tmp_path / "commands" / "count.py").write_text('"""Count."""\n\nGROUP = "Look"\n')
    monkeypatch.setattr(app, "__file__", str(tmp_path / "app.py"))
    assert own_commands() == {"count": ("Look", "Count.")}


def test_no_help_imports_anything_heavy():
    """Count modules and memory in place of seconds, which depend on the machine."""
    code = (
        "import re, sys\n"
        "from contextlib import suppress\n"
        "from pathlib import Path\n"
        "from cola_lightning.cli.app import TRAINER_COMMANDS, main, own_commands\n"
        "main(['--help'])\n"
        "for command in [*TRAINER_COMMANDS, *own_commands()]:\n"
        "    with suppress(SystemExit): main([command, '--help'])\n"
        "heavy = {'torch', 'lightning', 'transformers', 'numpy', 'jsonargparse', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 150, len(sys.modules)\n"
        "status = Path('/proc/self/status')\n"
        "if status.is_file(): assert int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) < 100 * 1024\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=REPOSITORY)
