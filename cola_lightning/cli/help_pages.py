"""Show help without importing torch: of Lightning's commands, and of functions, whose source is read.

The parsers of these commands need the classes that they make. To import them takes seconds, and their full help has
hundreds of lines.
"""

import ast
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from cola_lightning.cli.options import OptionParser
from cola_lightning.columns import as_typed, in_columns, wrap_paragraph
from cola_lightning.errors import InputError

PACKAGE = Path(__file__).parents[1]
COMMON_OPTIONS = {
    "--config FILE": "YAML file of settings; may be given several times, later ones win",
    "--run_dir FOLDER": "where the run's events, checkpoints and configuration go",
    "--ckpt_path FILE|last": "go on from a checkpoint, or from the newest of --run_dir",
    "--trainer.max_steps N": "optimizer steps of the run",
    "--trainer.devices N": "GPUs or processes on this machine",
    "--trainer.num_nodes N": "machines",
    "--trainer.strategy NAME": "auto, ddp, fsdp, deepspeed_stage_2 or a class",
    "--trainer.precision NAME": "32-true, bf16-mixed, bf16-true, …",
    "--trainer.val_check_interval N": "batches between two validations",
    "--trainer.callbacks+ NAME": "add a callback, such as CoLAM; --trainer.callbacks.NAME sets its arguments",
    "--model.hidden_size N": "width of the network; all sizes are --model.NAME",
    "--model.num_hidden_layers N": "layers",
    "--model.projection NAME": "CoLA, FullRank, LoRA, …; --model.projection.rank sets its rank",
    "--model.optimizer NAME": "a class of torch.optim or of this package; --model.optimizer.lr its learning rate",
    "--model.schedule NAME": "of the learning rate; --model.schedule.warmup_steps its warmup",
    "--model.compile BOOL": "compile the network",
    "--data NAME": "C4DataModule, TextDataModule or a class; --data.paths names text of your own",
    "--data.batch_size N": "rows of a micro-batch",
    "--checkpoint.every_n_train_steps N": "optimizer steps between two checkpoints",
    "--print_config": "print the whole configuration and stop",
}
"""The options that the help of Lightning's commands begins with."""


def asked_for(args: list[str]) -> str | None:
    """Return which help is asked for after the name of one of Lightning's commands.

    Returns:
        ``common`` or ``all``; None if no help is asked for.

    Raises:
        InputError: If it is another.
    """
    for number, arg in enumerate(args):
        name, given, topic = arg.partition("=")
        if name not in ("-h", "--help"):
            continue
        if not given and args[number + 1 : number + 2] == ["all"]:
            topic = "all"
        if topic not in ("", "all"):
            raise InputError(
                f"{arg} is unknown; --help shows the options that are used most, --help=all all options, and "
                "--NAME.help CLASS those of a class"
            )
        return topic or "common"
    return None


def common_help(command: str) -> str:
    """Make the beginning of a command's help: an example, and the options that are used most."""
    example = f"cola_lightning {command} --config configs/quickstart.yaml"
    example += (
        " --run_dir runs/quickstart" if command == "fit" else " --ckpt_path runs/quickstart/checkpoints/last.ckpt"
    )
    options = in_columns(COMMON_OPTIONS.items(), indent="  ")
    return "\n".join([f"Example: {as_typed(example)}", "", "Options that are used most:", *options, "", ""])


def common_page(command: str, line: str) -> str:
    """Make the page of ``COMMAND --help``.

    Args:
        command: One of Lightning's commands.
        line: Its line in the help of the program.
    """
    more = in_columns(
        [
            (f"cola_lightning {command} --help=all", "all options, with types and defaults"),
            (f"cola_lightning {command} --model.optimizer.help AdamW", "the options of a class, here of AdamW"),
            (f"cola_lightning {command} --config FILE --print_config", "the value of every option, as a config"),
        ],
        indent="  ",
    )
    end = wrap_paragraph(
        "Every option is also a key of a config: --trainer.max_steps 100 is trainer: {max_steps: 100}. What is typed "
        "later wins."
    )
    example, _, options = common_help(command).partition("\n\n")
    return "\n".join([example, "", *wrap_paragraph(line), "", options + "More:", *more, "", *end])


def show_if_asked(make_page: Callable[[], "FunctionHelp"], args: list[str]) -> None:
    """Print a page and end the process, if ``--help`` is among the arguments. Otherwise no source is read."""
    if {"-h", "--help"} & set(args):
        make_page().parser.parse_args(["--help"])


class FunctionHelp:
    """Help of a command whose options are the arguments of a function. It is read from the function's source.

    Args:
        command: Name of the command.
        example: What can be typed after it.
        function: Place of the function, as ``data/prepare.py:prepare``.
        nested: Places of the classes of arguments whose own arguments are options too, by name of the argument.
        skip: Arguments that are no options.
        as_positional: Whether required arguments are typed without their names.
        more: Last line of the page.
    """

    def __init__(
        self,
        command: str,
        example: str,
        function: str,
        nested: Mapping[str, str] = {},
        skip: tuple[str, ...] = (),
        as_positional: bool = False,
        more: str = "",
    ) -> None:
        self.parser = OptionParser(command, example, epilog=more or None)
        self.nested, self.skip, self.as_positional = nested, skip, as_positional
        self.parser.description, arguments = _read(function)
        self.parser.add_argument("-c", "--config", metavar="FILE", help="YAML file with these arguments")
        self.parser.add_argument("--print_config", action="store_true", help="print the configuration and stop")
        self._add(arguments, "")

    def _add(self, arguments: dict[str, tuple[str, str | None, str]], prefix: str) -> None:
        for name, (kind, default, text) in arguments.items():
            if name in self.skip and not prefix:
                continue
            if name in self.nested and not prefix:
                self._add(_read(self.nested[name])[1], f"{name}.")
                continue
            facts = f"{text} ({f'default: {default}; ' * (default not in (None, 'None'))}type: {kind}"
            facts += "; required)" if default is None else ")"
            about = facts.replace("%", "%%")
            if default is None and self.as_positional:
                self.parser.add_argument(name, help=about)
            else:
                self.parser.add_argument(
                    f"--{prefix}{name}", metavar=name.upper(), required=default is None, help=about
                )


def _read(place: str) -> tuple[str, dict[str, tuple[str, str | None, str]]]:
    """Read the definition of a function, or of a data class, from its source.

    Returns:
        First line of its docstring; by name of the argument, its type, its default (None if it is required) and its
        description.
    """
    file, _, name = place.partition(":")
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name)
    docstring = ast.get_docstring(found) or ""
    about = _descriptions(docstring)
    entries: list[tuple[str, ast.expr | None, ast.expr | None]] = []
    if isinstance(found, ast.ClassDef):
        for node in found.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                entries.append((node.target.id, node.annotation, node.value))
    else:
        arguments, defaults = found.args.args, found.args.defaults
        aligned = [None] * (len(arguments) - len(defaults)) + list(defaults)
        entries = [(each.arg, each.annotation, default) for each, default in zip(arguments, aligned, strict=True)]
    return docstring.partition("\n")[0], {
        name: (ast.unparse(kind) if kind else "", _text(default), about.get(name, ""))
        for name, kind, default in entries
    }


def _text(default: ast.expr | None) -> str | None:
    """Write a default as it is typed: a text without quotes."""
    if isinstance(default, ast.Constant) and isinstance(default.value, str):
        return default.value
    return None if default is None else ast.unparse(default)


def _descriptions(docstring: str) -> dict[str, str]:
    """Return the descriptions of arguments in a docstring of Google's style, by name, each as one line."""
    section = re.search(r"^Args:\n((?:(?: {4}.*)?\n?)*)", docstring, re.MULTILINE)
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section[1], re.MULTILINE) if section else []
    return {name: " ".join(text.split()) for name, text in found}
