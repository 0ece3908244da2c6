"""Read configs that build on other configs."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile

from cola_lightning.cli import config_yaml as config_yaml
from cola_lightning.cli.config_yaml import ConfigFileError

LARGEST = 2**20
"""Largest size of a config in bytes. A whole configuration has about 10,000."""
MOST = 50
"""Largest number of configs that one ``--config`` may bring along. One that is named twice counts twice."""


class ConfigFile(ActionConfigFile):
    """Action of ``--config FILE``. The file may name the configs that it builds on under ``config:``.

    Their paths are relative to the file. The files are applied as if each had been given by a ``--config`` of its own,
    the base first. jsonargparse accepts such a key too, but replaces whole groups instead of merging them.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        chain: list[tuple[str, str]] = []
        _append_chain(values, (), chain)
        for file, text in chain:
            try:
                self.apply_config(parser, cfg, self.dest, text)
            except TypeError as error:
                raise TypeError(f"{file}: {error}") from error


def _append_chain(value: str, above: tuple[Path, ...], chain: list[tuple[str, str]]) -> None:
    """Append to ``chain`` the files that ``value`` builds on, and then ``value`` itself.

    Args:
        value: Name of a file, or settings as text.
        above: The files that build on this one, to notice a cycle.
        chain: Name and text of each file so far, without the key ``config``.
    """
    path = Path(value)
    if "\n" in value or not path.is_file():
        chain.append(("settings", value))  # settings as text, or a wrong name, which jsonargparse reports
        return
    if path.resolve() in above:
        raise TypeError(f"{value} builds on itself, through {' and '.join(map(str, above))}")
    if len(chain) >= MOST or len(above) >= MOST:
        raise TypeError(f"{value} brings along more than {MOST} files that build on one another; name each once")
    settings = _read(path)
    bases = settings.pop("config", None) or []
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise TypeError(f"{value} builds on {base!r}; name a file, or a list of files")
        if not (path.parent / base).is_file():
            raise TypeError(f"{value} builds on {base}, which is not in {path.parent.resolve()}")
        _append_chain(str(path.parent / base), (*above, path.resolve()), chain)
    chain.append((value, yaml.safe_dump(settings, sort_keys=False)))


def _read(path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise TypeError(f"{path} has {size:,} bytes; a config has {LARGEST:,} at most")
        settings = config_yaml.load(path.read_text(encoding="utf-8"))
    except ConfigFileError as error:
        raise TypeError(f"{path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:  # ``!!timestamp 2024-02-30`` is a ValueError
        raise TypeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise TypeError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(settings, dict):
        raise TypeError(f"{path} holds no settings; a config is a mapping such as 'trainer: {{max_steps: 100}}'")
    return settings
