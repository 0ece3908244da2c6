"""Where tokenized text is kept between runs."""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp


def cache_folder(cache_dir: str | None) -> Path:
    """Return the folder that is named, or else ``cola_lightning`` in $XDG_CACHE_HOME, which is ~/.cache by default."""
    return Path(cache_dir or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/cola_lightning").expanduser()


def is_whole(folder: Path, load: Callable[[], object]) -> bool:
    """Check that a cached folder exists and can be loaded. One that cannot be loaded, as a full disk or a crash leaves
    it, is removed with a warning."""
    if not folder.exists():
        return False
    try:
        load()
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # each library has its own error for a file that is cut short
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"the cache {folder} is damaged ({reason}), and is made anew", stacklevel=2)
        shutil.rmtree(folder)
        return False
    return True


@contextmanager
def new_folder(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Make a folder that appears only when it is complete.

    Yields:
        A folder to fill, which is renamed to ``folder`` at the end, and one for temporary files, which is deleted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        content, temporary = scratch / "content", scratch / "temporary"
        content.mkdir()
        temporary.mkdir()
        yield content, temporary
        try:
            content.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another run was quicker, with the same content
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
