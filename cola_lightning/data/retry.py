"""Retry reads after transient errors: dropped connections, busy servers, files that are cut short."""

import random
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import chain
from typing import TypeVar

from cola_lightning.errors import InputError, hide_secrets

Result = TypeVar("Result")
Item = TypeVar("Item")

# A compressed stream that was cut off raises EOFError or zlib.error.
TRANSIENT_ERRORS = (OSError, EOFError, zlib.error)
# By name, because the version of the hub's client decides which of them is installed.
HTTP_CLIENTS = {"aiohttp", "httpx", "httpx2", "requests"}
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
PERMANENT_STATUS = (401, 403, 404, 410)
SILENCE = 15.0  # seconds between two warnings that a read is waiting
LONGEST_PAUSE = 3600.0  # seconds; a longer Retry-After is cut to it


@dataclass
class Retry:
    """Retries reads that fail.

    By default a read fails after 7 tries, with pauses of 2, 4, 8, 16, 32 and 64 s between them: 126 s in all, and up to
    a quarter more, because each pause is lengthened at random. The time of the tries themselves is not included.

    Args:
        times: Failures in a row, without a document between them, that are retried.
        wait: Seconds before the first retry; each further wait is twice as long.
    """

    times: int = 6
    wait: float = 2.0

    def call(self, function: Callable[[], Result], name: str) -> Result:
        """Call ``function``, and call it again after a transient error.

        Args:
            function: Function to call.
            name: What is read, for messages.

        Raises:
            InputError: After the last try, or at once for a permanent error; names ``name``.
        """
        failures = 0
        while True:
            try:
                with _said(name):
                    return function()
            except Exception as error:
                failures += 1
                self._wait_or_raise(error, name, failures)

    def iterate(
        self, read: Callable[[int], Iterator[tuple[int, Item]]], name: str, start: int, unit: str = "row"
    ) -> Iterator[tuple[int, Item]]:
        """Yield the numbered items of ``read(start)``.

        After a failure, ``read`` is called again with the number after the last item, so that no item is lost or
        repeated.

        Args:
            read: Function that yields the items with numbers of ``start`` or more.
            name: What is read, for messages.
            start: Number to begin at.
            unit: What the number counts, for messages.

        Raises:
            InputError: As :meth:`call`.
        """
        failures = 0
        while True:
            try:
                items = iter(read(start))
                with _said(name):
                    first = next(items, None)
                for number, item in chain([] if first is None else [first], items):
                    failures, start = 0, number + 1
                    yield number, item
                return
            except Exception as error:
                failures += 1
                self._wait_or_raise(error, f"{name} ({unit} {start})", failures)

    def _wait_or_raise(self, error: Exception, name: str, failures: int) -> None:
        if not (isinstance(error, TRANSIENT_ERRORS) or _from_client(error)):
            raise error
        request = failed_request(error)
        # fsspec raises FileNotFoundError for any failed request; its cause tells what happened.
        shown = request if request is not None and isinstance(error, PERMANENT_ERRORS) else error
        reason = f"{type(shown).__name__}: {str(shown).splitlines()[0] if str(shown) else 'no reason given'}"
        if _offline(error):
            raise InputError(
                f"{name} is not on this machine, and HF_HUB_OFFLINE is set; unset it, or name files that are here"
            ) from error
        if request is None and (isinstance(error, PERMANENT_ERRORS) or _status(error) in PERMANENT_STATUS):
            raise InputError(f"{name} cannot be read: {reason}") from error
        if failures > self.times:
            raise InputError(f"{name} could not be read in {failures} tries: {reason}") from error
        # The pause is random, so that workers that failed together do not retry together.
        pause = max(self.wait * 2 ** (failures - 1), _retry_after(error)) * random.uniform(1, 1.25)
        message = hide_secrets(f"{name}: {reason}; try {failures} of {self.times} in {pause:.1f} s")
        warnings.warn(message, stacklevel=3)
        time.sleep(pause)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, each once. ``raise error.__cause__`` makes a cycle of causes."""
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and not any(one is other for other in found):
        found.append(one)
        yield one
        one = one.__cause__ or one.__context__


def failed_request(error: BaseException) -> BaseException | None:
    """Return the failed request that led to an error and may succeed if it is sent again; None if there is none.

    Libraries hide such requests: fsspec raises FileNotFoundError when a server is busy or silent.
    """
    request = next((one for one in _chain(error) if _from_client(one)), None)
    return None if request is None or _status(request) in PERMANENT_STATUS else request


def _from_client(error: BaseException) -> bool:
    return any(kind.__module__.partition(".")[0] in HTTP_CLIENTS for kind in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)


def _offline(error: Exception) -> bool:
    """Whether a client refused to send a request because it is set to work offline."""
    return any(
        "OfflineModeIsEnabled" in (type(one).__name__, *str(one).replace("(", " ").replace(")", " ").split())
        for one in _chain(error)
    )


def _retry_after(error: Exception) -> float:
    """Return the seconds that a busy server asks to wait, at most an hour; 0 if it does not say."""
    for one in _chain(error):
        headers = getattr(one, "headers", None) or getattr(getattr(one, "response", None), "headers", None) or {}
        with suppress(KeyError, ValueError):  # no such header, or nonsense in it
            value = headers["Retry-After"]
            seconds = float(value) if value.isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
            return min(max(seconds, 0.0), LONGEST_PAUSE)
    return 0.0


@contextmanager
def _said(name: str) -> Iterator[None]:
    """Warn every ``SILENCE`` seconds that a read is still waiting, and for what."""
    done = threading.Event()
    began = time.monotonic()

    def say() -> None:
        while not done.wait(SILENCE):
            waited = time.monotonic() - began
            warnings.warn(hide_secrets(f"waiting for {name} to answer, for {waited:.0f} s so far"), stacklevel=1)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
