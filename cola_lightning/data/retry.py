"""Reading on through hard weather: dropped connections, busy servers, files that come short."""

import random
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from cola_lightning.errors import InputError, hide_secrets

Result = TypeVar("Result")
Item = TypeVar("Item")

# EOFError and zlib.error are what a compressed stream that was cut off looks like.
PASSING = (OSError, EOFError, zlib.error)
# By name, for which of them is installed depends on the version of the hub's client.
HTTP_CLIENTS = {"aiohttp", "httpx", "httpx2", "requests"}
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
LASTING_STATUS = (401, 403, 404, 410)


@dataclass
class Retry:
    """How a read that fails is tried again.

    Args:
        times: Failures in a row, without a document between them, that are borne.
        wait: Seconds before the first new try; each further wait is twice as long.
    """

    times: int = 6
    wait: float = 2.0

    def call(self, function: Callable[[], Result], name: str) -> Result:
        """``function()``, tried again while it fails for reasons that may pass.

        Raises:
            InputError: After the last try, or at once if the reason is there to stay; names ``name``.
        """
        failures = 0
        while True:
            try:
                return function()
            except Exception as error:
                failures += 1
                self._bear(error, name, failures)

    def iterate(
        self, read: Callable[[int], Iterator[tuple[int, Item]]], name: str, start: int
    ) -> Iterator[tuple[int, Item]]:
        """The numbered items of ``read(start)``. After a failure it goes on at the item after the last one, by a new
        ``read``, so that none is lost and none comes twice.

        Raises:
            InputError: As :meth:`call`.
        """
        failures = 0
        while True:
            try:
                for number, item in read(start):
                    failures, start = 0, number + 1
                    yield number, item
                return
            except Exception as error:
                failures += 1
                self._bear(error, f"{name} (row {start})", failures)

    def _bear(self, error: Exception, name: str, failures: int) -> None:
        clients = {kind.__module__.partition(".")[0] for kind in type(error).__mro__} & HTTP_CLIENTS
        if not (isinstance(error, PASSING) or clients):
            raise error
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, LASTING) or status in LASTING_STATUS:
            raise InputError(f"{name} cannot be read: {reason}") from error
        if failures > self.times:
            raise InputError(f"{name} could not be read in {failures} tries: {reason}") from error
        # Spread out, so that workers that failed together do not come back together.
        pause = self.wait * 2 ** (failures - 1) * random.uniform(1, 1.25)
        message = hide_secrets(f"{name}: {reason}; try {failures} of {self.times} in {pause:.1f} s")
        warnings.warn(message, stacklevel=3)
        time.sleep(pause)
