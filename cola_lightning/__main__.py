"""The command, as ``python -m cola_lightning`` and as the installed script ``cola_lightning``."""

import signal
import sys

# Until main() runs, Ctrl-C ends the process as any signal does, because Python would print a traceback of its imports.
# Only in a process of the command, not where this is imported.
_EARLY = (__name__ == "__main__" or sys.argv[0].endswith("cola_lightning")) and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _EARLY:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os  # noqa: E402
from contextlib import suppress  # noqa: E402

from cola_lightning import signals  # noqa: E402


def main() -> None:
    """Own the signals of a training command, then import what it needs, which takes seconds, and run it."""
    if sys.platform == "darwin":  # torch reads it when it is imported: compute on the CPU what Apple's GPU cannot
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    if sys.argv[1:2] and sys.argv[1] in ("fit", "validate", "test", "predict"):
        signals.die_with_launcher()
        signals.LISTENER.listen()
    # ``python -m`` looks for a user's classes in the working directory. A script looks in its own folder instead.
    with suppress(FileNotFoundError):  # of a working directory that was removed
        if not sys.flags.safe_path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
    try:
        if _EARLY and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        from cola_lightning.cli.app import main as run

        run()
    except KeyboardInterrupt:  # while that is imported
        print("error: ended by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
