"""The command, as ``python -m cola_lightning`` and as the installed script ``cola_lightning``."""

import os
import signal
import sys
from contextlib import suppress

from cola_lightning import signals


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
        from cola_lightning.cli.app import main as run

        run()
    except KeyboardInterrupt:  # while that is imported
        print("error: ended by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
