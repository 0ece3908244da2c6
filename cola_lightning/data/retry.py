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
# Raised where no connection is made, by httpx, by aiohttp and by Python; a silent server raises others.
UNREACHABLE = {"ConnectError", "ClientConnectorError", "ClientConnectorDNSError", "ConnectionRefusedError", "gaierror"}
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
PERMANENT_STATUS = (401, 403, 404, 410)
SILENCE = 15.0  # seconds between two warnings that a read is waiting
LONGEST_PAUSE = 3600.0  # seconds; a longer Retry-After is cut to it
AT_START = 30.0  # seconds until a run that finds no network at its start says so


@dataclass
class Retry:
    """Retries reads that fail.

    By default a read fails after 7 tries, with pauses of 2, 4, 8, 16, 32 and 64 s between them: 126 s in all, and up to
    a quarter more, because each pause is lengthened at random. The time of the tries themselves is not included.

    Args:
        times: Failures in a row, without a document between them, that are retried.
        wait: Seconds before the first retry; each further wait is twice as long.
        started: Whether the run has read something before, as one that resumes has. It then waits for a network, too.
    """

    times: int = 6
    wait: float = 2.0
    started: bool = False

    def call(self, function: Callable[[], Result], name: str, server: str | None = None) -> Result:
        """Call ``function``, and call it again after a transient error.

        Args:
            function: Function to call.
            name: What is read, for messages.
            server: Address of the server, if these may be the first requests that a run sends to it. If its name is
                unknown or it accepts no connection, this machine most likely has no network, and there is nothing yet
                that waiting could save. So no try begins that would end more than ``AT_START`` seconds after the first
                one began.

        Raises:
            InputError: After the last try, or at once for a permanent error; names ``name``.
        """
        failures, began = 0, time.monotonic()
        while True:
            begins = time.monotonic()
            try:
                with _said(name):
                    return function()
            except Exception as error:
                failures += 1
                unreachable = _unreachable(error)
                if unreachable is None or self.started:
                    server = None  # it is there, or it was there, so it may recover
                elif server is not None:
                    # Example: the client of the hub retries too, so that its try lasts 23 s. A pause of 2 s and another
                    # such try would end after 48 s.
                    now = time.monotonic()
                    if (now - began) + self._pause(failures) + (now - begins) >= AT_START:
                        raise InputError(
                            f"{name} cannot be read, because {server} cannot be reached ({_reason(unreachable)}); "
                            f"check the network, or name files that are on this machine"
                        ) from error
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
        reason = _reason(request if request is not None and isinstance(error, PERMANENT_ERRORS) else error)
        if _offline(error):
            raise InputError(
                f"{name} is not on this machine, and HF_HUB_OFFLINE is set; unset it, or name files that are here"
            ) from error
        if request is None and (isinstance(error, PERMANENT_ERRORS) or _status(error) in PERMANENT_STATUS):
            raise InputError(f"{name} cannot be read: {reason}") from error
        if failures > self.times:
            raise InputError(f"{name} could not be read in {failures} tries: {reason}") from error
        # The pause is random, so that workers that failed together do not retry together.
        pause = max(self._pause(failures), _retry_after(error)) * random.uniform(1, 1.25)
        message = hide_secrets(f"{name}: {reason}; try {failures} of {self.times} in {pause:.1f} s")
        warnings.warn(message, stacklevel=3)
        time.sleep(pause)

    def _pause(self, failures: int) -> float:
        """Return the seconds to wait after that many failures, at least."""
        return self.wait * 2 ** (failures - 1)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


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


def _unreachable(error: BaseException) -> BaseException | None:
    """Return the error, or its cause, that says that no connection could be made: the server's name is unknown, or
    nothing answers at its address. None if the server was there."""
    return next((one for one in _chain(error) if type(one).__name__ in UNREACHABLE), None)


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
