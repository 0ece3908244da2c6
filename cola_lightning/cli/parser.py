"""Parse a command line, and report what cannot be parsed in one line."""

import importlib
import inspect
import re
import sys
from argparse import HelpFormatter
from collections.abc import Callable, Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser

import cola_lightning.cli.import_policy  # noqa: F401  denies what no config may name
from cola_lightning.columns import as_typed
from cola_lightning.errors import did_you_mean, hide_secrets
from cola_lightning.private_apis.jsonargparse import commands_of, options_of

GIVEN = ("in_features", "out_features", "params", "optimizer")
"""Arguments that come from the network and the run, not from the command line."""

WORDS = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text", "list": "a list",
    "dict": "a mapping", "NoneType": "null",
}  # fmt: skip


SYNONYMS = {
    "lr": "--model.optimizer.lr", "learning_rate": "--model.optimizer.lr", "batch_size": "--data.batch_size",
    "seq_len": "--data.sequence_length", "rank": "--model.projection.rank", "warmup": "--model.schedule.warmup_steps",
    "paths": "--data.paths", "seed": "--seed_everything", "steps": "--trainer.max_steps",
    "epochs": "--trainer.max_epochs", "gpus": "--trainer.devices", "output_dir": "--run_dir",
    "resume": "--ckpt_path last",
}  # fmt: skip
"""Options of Lightning's commands by names that other programs have for them."""


class Parser(ArgumentParser):
    """Parser that reports an error in one line: the place, the value and the fix.

    jsonargparse's own messages list every type that a value may have.

    Attributes:
        bases: Base classes of the classes that can be named. A misspelt name is compared with theirs.
        example: Command line with which the help begins.
    """

    bases: tuple[type, ...] = ()
    example: str = ""

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        return (f"Example: {as_typed(self.example)}\n\n" if self.example else "") + super().format_help(formatter)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser within another: it tries the next type
            super().error(message, ex)
        commands = commands_of(self)
        options = {option for parser in (self, *commands.values()) for option in options_of(parser)}
        print(f"error: {hide_secrets(explain(message, options, commands, _names(self.bases)))}", file=sys.stderr)
        sys.exit(2)


def parse_function(
    function: Callable,
    command: str,
    example: str,
    args: list[str],
    as_positional: bool = True,
    skip: Collection[str] = (),
) -> dict[str, Any]:
    """Parse the arguments of a function from flags and ``--config``, and make the objects among them.

    Args:
        function: The function; its docstring is the help.
        command: Name of the command.
        example: Arguments of the example in the help.
        args: The command line after the name of the command.
        as_positional: Whether required arguments are typed without their names.
        skip: Names of arguments that are not typed.

    Returns:
        The arguments by name.
    """
    parser = function_parser(function, command, example, as_positional, skip)
    options = parser.instantiate_classes(parser.parse_args(args))
    del options["config"]
    return options.as_dict()


def function_parser(
    function: Callable, command: str, example: str, as_positional: bool = True, skip: Collection[str] = ()
) -> Parser:
    """Make the parser of :func:`parse_function`, which describes its arguments."""
    parser = Parser(prog=f"cola_lightning {command}", description=(function.__doc__ or "").partition("\n")[0])
    parser.example = f"{parser.prog} {example}"
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with these arguments")
    parser.add_function_arguments(
        function, as_group=False, as_positional=as_positional, skip=set(skip), sub_configs=True
    )
    return parser


def explain(
    message: str, options: Iterable[str] = (), commands: Iterable[str] = (), classes: Iterable[str] = ()
) -> str:
    """Shorten a message of jsonargparse to one line. A message of an unknown kind keeps all its words.

    Args:
        message: What jsonargparse says, in several lines.
        options: Names to suggest in place of a misspelt option.
        commands: The same for a command.
        classes: The same for a class.
    """
    # A misspelt option or command.
    if found := re.search(r"unrecognized arguments: ([^\s=]+)", message):
        return _no_option(found[1], options)
    if found := re.search(r"(?:Group '(\S+)'|Subcommand '\S+') does not accept option '(\S+)'", message):
        return _no_option("--" + ".".join(filter(None, found.groups())), options)
    if found := re.search(r"argument subcommand: invalid choice: '(\S*)'", message):
        return f"{found[1]} is not a command{did_you_mean(found[1], commands)}; --help lists them"
    if 'expected "subcommand"' in message:
        return "no command is given; --help lists them"
    if found := re.match(r"the following arguments are required: ([\w., ]+)", message):
        names = [re.sub(rf"^({'|'.join(commands)})\.", "", name) for name in found[1].split(", ")]
        flags = [f"--{name}" if f"--{name}" in options else name for name in names]
        return f"{' and '.join(flags)} must be given, on the command line or in a config; --help lists the options"
    # A config that is not there.
    if found := re.search(r"Parser key \"config\": (?:File does not exist|Path is not a file): '(.*)'", message):
        return _no_config(Path(found[1]))
    if message.strip() == "Unexpected config:":
        return "--config is empty; name a YAML file"
    # What is left is about a value. It names the place and, within the class that was given there, the argument.
    # Example of --model.schedule.T_max soon, shortened:
    #
    #     Parser key "model.schedule":
    #       Type Callable[[Optimizer], LRScheduler] expects a function or a callable class: Parser key "T_max":
    #         Does not validate against any of the Union subtypes
    #         Errors:
    #           - Expected a <class 'int'>
    #           - Expected a <class 'NoneType'>
    #         Given value: soon. Got value: Namespace(class_path='torch.optim.lr_scheduler.CosineAnnealingLR', …)
    if 'Parser key "' not in message:
        return " ".join(message.split())
    # The classes that a value may belong to are tried one after another; the first is the one that was typed.
    tried = re.search(r"^( *)- (Problem with given class_path .*?)(?=\n\1\S|\n *Given value|\Z)", message, re.S | re.M)
    first = message[: tried.start()] + tried[2] if tried else message
    # The keys of the example, "model.schedule" and "T_max", are the place --model.schedule.T_max.
    place = "--" + ".".join(re.findall(r'Parser key "([^"]+)"', first))
    # An import path that the import policy denies.
    if found := re.search(r"Importing '([\w.]+)' is not allowed(?:: (\S+) holds no (\w+)\.)?", message):
        if found[2]:
            return f"{place} is {found[1]}, but {found[2]} holds no {found[3]}; it is not imported"
        return f"{place} names {found[1]}, which no run needs and which could run any code; it is not imported"
    # An argument that the class lacks, or needs.
    if found := re.search(r"Option '(\w+)' is not accepted", first):
        return f"{place}.{found[1]}: {_lacks(_class_path(first), found[1])}"
    if found := re.search(r"arguments are required: ([\w, ]+)", first):
        missing, owner = (f"{place}.{name}" for name in found[1].split(", ")), _class_path(first).rpartition(".")[2]
        return f"{' and '.join(missing)} must be given{f', because {owner} needs it' * bool(owner)}"
    # A class of a package that is not installed.
    absent = re.search(r"No module named '(\w+)", first)
    if absent and find_spec(absent[1]) is None and (value := re.search(r"Got value: ([\w.]+)", first)):
        return f"{place} is {value[1]}, but there is no package {absent[1]}; check the name, or install the package"
    # A class that does not exist, or a value of the wrong type. In the example, what was given is "soon", and it takes
    # a whole number or null.
    given = re.search(r"Given value: (.*?)(?:\. Got value: .*)?$", first, re.M) or re.search(r"Got value: (.*)", first)
    name = re.search(r"dot import path string: ([\w.]+)|has no attribute '\w+'\. Got value: ([\w.]+)", first)
    takes = _types(first)
    # A place that takes numbers or choices, too, is described by these. Only true, false and null may stand beside a
    # class.
    if name and not set(takes) - {"true or false", "null"}:
        path = name[1] or name[2]
        return (
            f"{place} is {path}, a class that cannot be found{did_you_mean(path.rpartition('.')[2], classes)}; "
            "name one of those that --help lists, or any by its import path"
        )
    if given and takes:
        typed = given[1].strip() or "empty"
        return f"{place} is {typed}; it must be {', '.join(takes[:-1])}{' or ' if takes[1:] else ''}{takes[-1]}"
    return f"{place}: " + " ".join(message.split(":", 1)[1].split())


def _no_config(path: Path) -> str:
    """Describe a config that is not a file, with a similar one that is."""
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    if path.is_dir():
        return f"--config {path} is a directory; name a YAML file"
    # Of "fast", for example, configs/fast.yaml may be meant; of "configs/quickstrat.yaml" a file beside it.
    places = [f"{path}.yaml", f"configs/{path}", f"configs/{path}.yaml"]
    known = [place for place in places if Path(place).is_file()]
    beside = [each.name for each in path.parent.glob("*.yaml")]
    hint = f" (did you mean {known[0]}?)" if known else did_you_mean(path.name, beside)
    return f"--config {path} does not exist{hint}; name a YAML file"


def _no_option(name: str, options: Iterable[str]) -> str:
    # The last word counts: --model.learning_rate is compared as learning_rate. The synonyms are options of the commands
    # with a Trainer, which have --trainer.max_steps.
    if (other := SYNONYMS.get(name.rpartition(".")[2].lstrip("-"))) and "--trainer.max_steps" in options:
        return f"{name} is not an option (did you mean {other}?); --help lists them"
    if not name.startswith("-"):
        hint = f" (did you mean --config {name}?)" if name.endswith((".yaml", ".yml", ".json")) else ""
        return f"{name} is not an option{hint}; the names of options begin with --"
    return f"{name} is not an option{did_you_mean(name, options)}; --help lists them"


def _class_path(text: str) -> str:
    found = re.search(r"class_path[ =]'([\w.]+)'", text)
    return found[1] if found else ""


def _lacks(class_path: str, name: str) -> str:
    module, _, owner = class_path.rpartition(".")
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), owner)).parameters
        accepted = [name for name in parameters if name not in GIVEN]
    except (ImportError, AttributeError, ValueError, TypeError):
        accepted = []
    hint = did_you_mean(name, accepted) or f"; it has {', '.join(accepted)}" * bool(accepted)
    return f"{owner or 'this class'} has no option {name}{hint}"


def _types(text: str) -> list[str]:
    """Describe in words the types that a value may have, without classes."""
    words: list[str] = []
    # Examples: "Expected a <class 'int'>" is "a whole number"; "Expected a typing.Literal['latents', 'block_input']"
    # is the two words in it.
    for kind in re.findall(r"Expected (?:an? )?(<class '[^']+'>|typing\.Literal\[[^\]]*\])", text):
        if kind.startswith("typing.Literal"):
            words += re.findall(r"[^\s\[\],']+", kind.removeprefix("typing.Literal"))
        else:
            words += [WORDS[name] for name in [kind.split("'")[1]] if name in WORDS]
    return list(dict.fromkeys(words))


def _names(bases: Iterable[type]) -> set[str]:
    """Return the names of these classes and of all their subclasses that are imported."""
    return {base.__name__ for base in bases}.union(*(_names(base.__subclasses__()) for base in bases))


def reason_of(message: str) -> str | None:
    """Find why a class could not be made in jsonargparse's report, which has a paragraph for each type of a union.

    Example: ``a.B cannot be made: __init__() missing 1 required positional argument: 'mode'``.

    Returns:
        One line, or None if the report gives no such reason.
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    problems = [line for line in lines if re.search(r"missing \d+ required|Requirement '.*' not met", line)]
    classes = re.findall(r"class_path='([\w.]+)'", message)
    if classes and not problems and message.startswith("Does not validate against any of the Union subtypes"):
        # What the constructor said is lost in this report. The class is of the right kind, or parsing had refused it.
        return f"{classes[0]} cannot be made with these arguments on this machine; make one in Python to see why"
    if not problems or not classes:
        return None
    return f"{classes[0]} cannot be made: {problems[0]}"
