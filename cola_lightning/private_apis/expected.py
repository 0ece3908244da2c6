"""Expectations of private APIs, and the replacement of one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from cola_lightning.errors import InputError


class PrivateAPIError(InputError):
    """Private API of a library that is not what this package was written for."""

    exit_status = 1


class Expected(NamedTuple):
    """A private API, and what this package expects of it.

    Attributes:
        path: ``module:name`` or ``module:Class.name``.
        parameters: Names of the arguments; None if it is not a function, or its arguments do not matter.
        mentions: Names and texts that the function's code must have: an attribute that it sets or reads, or a method
            that it calls and this package replaces.
    """

    path: str
    parameters: str | None = None
    mentions: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """Name of the library for ``pip``."""
        return self.path.partition(":")[0].partition(".")[0]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute while the context lasts."""
    before = replace_attribute(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def replace_attribute(owner: Any, name: str, value: Any) -> Any:
    """Set an attribute and return its old value. It must exist, because setting a renamed one would do nothing."""
    try:
        before = getattr(owner, name)
    except AttributeError:
        raise PrivateAPIError(f"{owner.__name__}.{name} is missing; mend {__package__}, which replaces it") from None
    setattr(owner, name, value)
    return before
