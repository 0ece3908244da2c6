"""Dispatch a command line to its command, and report in one line what a user can mend."""

import errno
import importlib
import io
import os
import re
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

from cola_lightning.cli.help_pages import asked_for, common_page
from cola_lightning.columns import as_typed, in_columns, wrap_paragraph
from cola_lightning.errors import InputError, did_you_mean
from cola_lightning.light_import import import_lightning
from cola_lightning.quiet import hide_library_messages

TRAINER_COMMANDS = {
    "fit": ("Train", "Train a model, or go on with a run."),
    "validate": ("Look", "Measure a model on the validation data of a config."),
    "test": ("Look", "Measure a model on the test data of a config."),
    "predict": ("Use", "Write the perplexity of each row of a config's data."),
}
"""Lightning's commands: group and line of each in ``--help``."""
GROUPS = ("Train", "Look", "Compare", "Use")
"""Groups of commands in ``--help``, in this order."""
CLOSED_PIPE = 141
"""Exit status of a command that a closed pipe ended: 128 and the signal's number, as shells report it."""
FILE_ERRORS = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
    errno.EFBIG, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO, errno.ENODEV, errno.ENXIO,
}  # fmt: skip
"""Errors of the operating system that are about a file or a disk, and no fault of this program."""
SYNONYMS = {"train": "fit", "pretrain": "fit", "eval": "evaluate", "sample": "generate", "version": "--version"}
"""Commands by names that other programs have for them."""
EXAMPLES = {
    "cola_lightning fit --config configs/quickstart.yaml": "a small model in minutes",
    "cola_lightning estimate --config configs/cola_1b.yaml": "what a run will cost",
    "cola_lightning generate runs/quickstart --prompt 'We'": "let a model continue a text",
}


def own_commands() -> dict[str, tuple[str, str]]:
    """List the files of the folder ``commands``: group and first line of the docstring of each, without importing."""
    found = {}
    for file in sorted(Path(__file__).with_name("commands").glob("[!_]*.py")):
        text = file.read_text(encoding="utf-8")
        line, group = re.match(r'"""(.+?)(?:"""|\n)', text), re.search(r'^GROUP = "(.+)"$', text, re.MULTILINE)
        assert line, f"{file.name} does not begin with a docstring"
        assert group, f"{file.name} has no GROUP"
        found[file.stem] = (group[1], line[1])
    return found


def help_text() -> str:
    """Describe the program: its commands by group, with a line each, and examples."""
    commands = TRAINER_COMMANDS | own_commands()
    width = max(map(len, commands))
    about = "Pre-train LLaMA-style language models with low-rank projections (CoLA and others)."
    lines = ["usage: cola_lightning COMMAND [OPTION ...]", "", *wrap_paragraph(about)]
    for group in GROUPS:
        entries = [(f"{name:<{width}}", line) for name, (its, line) in commands.items() if its == group]
        lines += ["", f"{group}:", *in_columns(entries, indent="  ")]
    examples = [(as_typed(command), line) for command, line in EXAMPLES.items()]
    lines += ["", "Examples:", *in_columns(examples, indent="  ")]
    return "\n".join([*lines, "", *wrap_paragraph("cola_lightning COMMAND --help shows the options of a command.")])


def dispatch(args: list[str]) -> None:
    """Parse a command line and run its command. Only this command is imported, and parsed before what it needs is.

    Raises:
        InputError: If there is no such command, or what was typed cannot work.
    """
    match args:
        case ["-h" | "--help" | "help", *_]:
            print(help_text())
            return
        case []:
            raise InputError("no command is given; --help lists them")
        case [name, *rest] if name in own_commands():
            command = importlib.import_module(f"cola_lightning.cli.commands.{name}")
            options = command.parse(rest)
        case ["--version", *_]:
            from importlib.metadata import version  # slow to import

            print(f"cola_lightning {version('cola-lightning')}")
            return
        case [name, *_] if not (name in TRAINER_COMMANDS or name.startswith("-")):
            known = [*TRAINER_COMMANDS, *own_commands()]
            hint = f" (did you mean {SYNONYMS[name]}?)" if name in SYNONYMS else did_you_mean(name, known)
            raise InputError(f"{name} is not a command{hint}; --help lists them")
        case [name, *rest] if name in TRAINER_COMMANDS and (topic := asked_for(rest)):
            if topic == "common":
                print(common_page(name, TRAINER_COMMANDS[name][1]))
                return
            command, options = _lightning_cli(), [name, "--help"]
        case _:  # options before the name of one of Lightning's commands are its too
            command, options = _lightning_cli(), args
    import_lightning()
    from cola_lightning.checkpoints import plain_data_only
    from cola_lightning.cli.guards import guard_run

    hide_library_messages()
    # Lightning's commands parse their options first: the guard takes a second to import, and --print_config needs none.
    with guard_run(), nullcontext() if options is args else plain_data_only():
        command.run(options)


def _lightning_cli() -> ModuleType:
    import_lightning()
    return importlib.import_module("cola_lightning.cli.lightning_cli")


def main(args: list[str] | None = None) -> None:
    """Run the command line; ``args`` in place of ``sys.argv[1:]`` for use from Python."""
    args = sys.argv[1:] if args is None else args
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # letters that a terminal's encoding lacks end no command
    try:
        dispatch(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # a failure to write is noticed here, where it can be reported
    except BrokenPipeError:
        if args and args[0] in TRAINER_COMMANDS and not asked_for(args[1:]):
            raise
        print("error: standard output was closed before all was written, as by '| head'", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing more is written to the pipe
        sys.exit(CLOSED_PIPE)
    except KeyboardInterrupt:
        print("error: ended by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except InputError as error:
        message = re.sub(r"\s*\n\s*", " ", str(error))  # messages of libraries may have several lines
        print(f"error: {message}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        place = error.filename or "a file"
        print(f"error: {place} cannot be read or written: {error.strerror}; choose another place", file=sys.stderr)
        sys.exit(1)
    except MemoryError:
        print("error: memory does not suffice; some size in the settings asks for more than there is", file=sys.stderr)
        sys.exit(1)
