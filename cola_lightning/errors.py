"""The one exception for what a user can mend, and what helps to mend it."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Input or settings that cannot work. The message is one line that names the value, the place and the fix; the
    command line prints it without a traceback."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """What was probably meant, in brackets, with a space before; empty if nothing comes near."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(candidates)}
    close = [by_lower[match] for match in get_close_matches(name.lower(), by_lower, n=2, cutoff=0.7)]
    return f" (did you mean {' or '.join(close)}?)" if close else ""
