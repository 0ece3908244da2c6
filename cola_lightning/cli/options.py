"""The parser of commands with few options, made of the standard library alone, so that ``--help`` is quick."""

import argparse
import re
from typing import Any, NoReturn

from cola_lightning import errors
from cola_lightning.columns import as_typed
from cola_lightning.errors import InputError, did_you_mean


class OptionParser(argparse.ArgumentParser):
    """Report what cannot be parsed in one line. Options cannot be abbreviated. The help begins with an example.

    Args:
        command: Name of the command.
        example: What can be typed after it.
        settings: As for :class:`argparse.ArgumentParser`.

    Raises:
        InputError: If an option is unknown, missing or of the wrong type.
    """

    def __init__(self, command: str, example: str = "", **settings: Any) -> None:
        super().__init__(f"cola_lightning {command}", allow_abbrev=False, **settings)
        self.example = f"{self.prog} {example}".rstrip()
        self.register("type", int, _parse_int)

    def format_help(self) -> str:
        return f"Example: {as_typed(self.example)}\n\n{super().format_help()}"

    def error(self, message: str) -> NoReturn:
        _, unknown, words = message.partition("unrecognized arguments: ")
        if unknown and words.startswith("-"):
            name = words.split()[0].partition("=")[0]
            options = re.findall(r"--\w+", self.format_usage())
            raise InputError(f"{name} is not an option{did_you_mean(name, options)}; --help lists them")
        raise InputError(f"{message}; {self.prog} --help lists the options")


def _parse_int(text: str) -> int:
    """Parse a whole number of at most 64 bits, because libraries cannot count with more."""
    number = int(text)
    if abs(number) >= 2**63:
        raise argparse.ArgumentTypeError(f"{number} is too large; it must be below 2^63")
    return number


def any_int(text: str) -> int:
    """Parse a whole number whose range the command checks by itself."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None


def check_at_least(minimum: int, options: argparse.Namespace, *names: str) -> None:
    """Check whole numbers that may be absent.

    Raises:
        InputError: If one is below the minimum.
    """
    errors.check_at_least(minimum, "--", **{name: getattr(options, name) for name in names})
