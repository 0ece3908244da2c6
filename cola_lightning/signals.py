"""Handle the signals that ask a training command to stop, from its first line on. Imports nothing that is slow.

Before training begins, a signal ends the process at once, because nothing is lost by that. During training a signal is
noted, and the run ends after a whole step with a checkpoint (``preemption``). While a run ends, a signal gives it
``SECONDS_TO_END``.

Python runs a signal handler between two bytecodes of the main thread, which may be inside a library that waits for
another process. Therefore the handlers do nothing. A thread reads the signals' numbers from a pipe, to which the
interpreter writes them at once (``signal.set_wakeup_fd``).
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Any

STOP = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""Signals that ask a command to stop. Windows has only the first two."""

SECONDS_TO_END = 45.0
"""Seconds that a process which was told to stop may take from its last step to its end."""


class Phase(Enum):
    """The part of a command that runs now. It decides what a signal does."""

    STARTING = "starting"
    TRAINING = "training"
    ENDING = "ending"


class Listener:
    """Receive the signals of this process. There is one, ``LISTENER``, because signals belong to a process."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.noted = 0
        self.before_exit: Callable[[int], None] = lambda number: None
        """Function that is called with the signal's number before a signal ends a process that does not train yet."""
        self._handlers: dict[int, Any] = {}

    def listen(self) -> bool:
        """Listen from now on. An interactive interpreter and other threads than the main one keep their signals.

        Returns:
            Whether this call began to listen.
        """
        if self._handlers or hasattr(sys, "ps1") or threading.current_thread() is not threading.main_thread():
            return False
        self.phase, self.noted = Phase.STARTING, 0
        reader, writer = os.pipe()
        if hasattr(os, "set_blocking"):  # Windows has it from Python 3.12 on, and needs it only for sockets
            os.set_blocking(writer, False)
        self._pipe = reader, writer, signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True, name="signals").start()
        for number in STOP:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP; shells, a background's SIGINT
                self._handlers[number] = signal.signal(number, _do_nothing)
        _at_fork()
        return True

    def unlisten(self) -> None:
        """Stop listening, and restore the handlers of before."""
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._handlers = {}
        _, writer, before = self._pipe
        signal.set_wakeup_fd(before)
        os.write(writer, b"\0")  # ends the thread, which closes its end
        os.close(writer)

    @property
    def listening(self) -> bool:
        """Whether this listens."""
        return bool(self._handlers)

    def end_soon(self, number: int) -> None:
        """End this process after ``SECONDS_TO_END``, if it has not ended by then."""
        self.phase = Phase.ENDING
        timer = threading.Timer(SECONDS_TO_END, os._exit, args=(128 + number,))
        timer.daemon = True
        timer.start()

    def _watch(self, reader: int) -> None:
        """Read the numbers of signals from the pipe, in a thread, until :meth:`unlisten` writes a 0."""
        while number := os.read(reader, 1)[0]:
            if number in STOP:
                self._receive(number)
        os.close(reader)

    def _receive(self, number: int) -> None:
        """Act on a signal, according to the phase."""
        again = number == signal.SIGINT == self.noted
        self.noted = self.noted or number
        name = signal.Signals(number).name
        if again:
            tell(f"\n{name} again: ended at once")
            os._exit(128 + number)
        if self.phase is Phase.STARTING:
            tell(f"\n{name} before training began: ended at once, nothing was lost by that")
            self.before_exit(number)
            os._exit(128 + number)
        if self.phase is Phase.TRAINING:
            more = "; Ctrl-C again ends it at once, without" if number == signal.SIGINT else ""
            tell(f"\n{name}: this run ends after the step, with a checkpoint{more}")
        else:
            self.end_soon(number)


LISTENER = Listener()


def die_with_launcher() -> None:
    """Let this rank end with the process that launched it (Linux only)."""
    if "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ:
        die_with_parent()


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, even by SIGKILL (Linux only)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)


def leave_signals_to_parent() -> None:
    """Ignore signals in a worker process, because the run needs its data until it stops.

    A signal may be sent to all processes of a run. SIGTERM ends a worker after 20 seconds, because a pool ends workers
    by it that do not answer.
    """
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))


def _do_nothing(*_: Any) -> None:
    pass


def tell(text: str) -> None:
    """Write a line to stderr. ``print`` is not used, because the main thread may hold its lock."""
    with suppress(OSError):  # the terminal may be closed
        os.write(2, f"{text}\n".encode())


_FORKING = False


def _at_fork() -> None:
    global _FORKING
    if not _FORKING and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_in_child)
        _FORKING = True


def _in_child() -> None:
    if LISTENER._handlers:
        LISTENER._handlers = {}
        signal.set_wakeup_fd(-1)  # the pipe is the parent's
        leave_signals_to_parent()
