"""Errors that a user can mend, and hints in their messages."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

_SECRETS = re.compile(
    r"(?<=://)[^/\s'\"]+(?=@)"  # user and password before the host
    r"|(?<=[?&])(?P<name>[\w-]*(?:token|signature|credential|password|secret|key)|sig)=[^&\s'\"#]+",
    re.IGNORECASE,
)


class InputError(ValueError):
    """Input or settings that cannot work.

    The message is one line that names the value, the place and the fix. The command line prints it without a
    traceback. Secrets in addresses are hidden.

    Attributes:
        exit_status: Exit status of the command line.
    """

    exit_status = 2

    def __init__(self, *messages: object) -> None:
        super().__init__(*(hide_secrets(message) if isinstance(message, str) else message for message in messages))


class RankError(InputError):
    """Failure of another process of the run, while this one had none."""

    exit_status = 1


class UnusableModelError(InputError):
    """Model with weights that are NaN or infinite."""

    exit_status = 1


def hide_secrets(text: str) -> str:
    """Replace user, password and the query's secrets in each address by ``***``."""
    return _SECRETS.sub(lambda found: f"{found['name']}=***" if found["name"] else "***", text)


def check_at_least(least: float, prefix: str = "", /, **values: float | None) -> None:
    """Check that numbers are not below a limit.

    Args:
        least: The limit.
        prefix: Beginning of the message, before the name: ``--data.``, or ``LossGuard: ``.
        values: Numbers by name; None is allowed.

    Raises:
        InputError: For the first that is below, or NaN.
    """
    for name, value in values.items():
        if value is not None and not value >= least:
            raise InputError(f"{prefix}{name} is {value}; it must be at least {least}")


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return " (did you mean …?)" with up to two similar names; an empty text if none is similar."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(candidates)}
    close = [by_lower[match] for match in get_close_matches(name.lower(), by_lower, n=2, cutoff=0.7)]
    return f" (did you mean {' or '.join(close)}?)" if close else ""
