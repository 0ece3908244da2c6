"""Where tokenised text is kept between runs."""

import os
from pathlib import Path


def cache_folder(cache_dir: str | None) -> Path:
    """The folder that is named, or ``cola_lightning`` in $XDG_CACHE_HOME, which is ~/.cache where it is not set."""
    return Path(cache_dir or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/cola_lightning").expanduser()
