"""Where tokenized text is kept between runs."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path


def cache_folder(cache_dir: str | None) -> Path:
    """The folder that is named, or ``cola_lightning`` in $XDG_CACHE_HOME, which is ~/.cache where it is not set."""
    return Path(cache_dir or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/cola_lightning").expanduser()


def is_whole(folder: Path, load: Callable[[], object]) -> bool:
    """Whether a cached folder is there and can be loaded. One that cannot, as a full disk or a crash leaves it, is said
    and taken away."""
    if not folder.exists():
        return False
    try:
        load()
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # each library has its own for a file that is cut short
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"the cache {folder} is damaged ({reason}), and is made anew", stacklevel=2)
        shutil.rmtree(folder)
        return False
    return True
