"""The command ``compare``."""

import shlex

from cola_lightning.cli.parser import Parser
from cola_lightning.compare.plan import Resolve
from cola_lightning.compare.sweep import compare
from cola_lightning.compare.trials import Command


def main(args: list[str], resolve: Resolve, command: Command) -> None:
    """Parse the arguments of :func:`cola_lightning.compare.sweep.compare`, as flags or in a file named by ``--config``.

    Args:
        args: The command line, without the command's name.
        resolve: Makes a whole configuration of the flags of ``fit``.
        command: Runs a command line of this package.
    """
    parser = Parser(prog="cola_lightning compare")
    parser.add_argument("-c", "--config", action="config", help="The plan, a YAML file.")
    parser.add_function_arguments(compare, as_group=False, skip={"resolve", "command", "command_line"})
    options = parser.instantiate_classes(parser.parse_args(args))
    del options["config"]
    compare(resolve, command, shlex.join(["python", "-m", "cola_lightning", "compare", *args]), **options)
