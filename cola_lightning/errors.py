"""The one exception for what a user can mend, and what helps to mend it."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

_SECRETS = re.compile(
    r"(?<=://)[^/\s'\"]+(?=@)"  # user and password before the host
    r"|(?<=[?&])(?P<name>[\w-]*(?:token|signature|credential|password|secret|key)|sig)=[^&\s'\"#]+",
    re.IGNORECASE,
)


class InputError(ValueError):
    """Input or settings that cannot work. The message is one line that names the value, the place and the fix; the
    command line prints it without a traceback. Secrets in addresses are hidden in it.

    Attributes:
        exit_status: With what the command line ends.
    """

    exit_status = 2

    def __init__(self, *messages: object) -> None:
        super().__init__(*(hide_secrets(message) if isinstance(message, str) else message for message in messages))


class RankError(InputError):
    """Another process of a run failed where this one did not."""

    exit_status = 1


class UnusableModelError(InputError):
    """A model that was read, and whose numbers are none: NaN or infinity."""

    exit_status = 1


def hide_secrets(text: str) -> str:
    """Replace user and password of each address, and values of its query that grant access, by ``***``."""
    return _SECRETS.sub(lambda found: f"{found['name']}=***" if found["name"] else "***", text)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """What was probably meant, in brackets, with a space before; empty if nothing comes near."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(candidates)}
    close = [by_lower[match] for match in get_close_matches(name.lower(), by_lower, n=2, cutoff=0.7)]
    return f" (did you mean {' or '.join(close)}?)" if close else ""
