"""Run files that build on run files."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile


class ConfigFile(ActionConfigFile):
    """``--config FILE``, where a file may name those that it builds on under ``config:``, relative to itself.

    jsonargparse by itself accepts such a key too, but replaces whole groups instead of merging them. Here the chain is
    laid out as if each file had been given by a ``--config`` of its own, the foundation first.
    """

    def __call__(self, parser: Any, cfg: Any, values: str, option_string: str | None = None) -> None:
        for file, text in _chain(values):
            try:
                self.apply_config(parser, cfg, self.dest, text)
            except TypeError as error:
                raise TypeError(f"{file}: {error}") from error


def _chain(value: str, seen: tuple[Path, ...] = ()) -> list[tuple[str, str]]:
    """The files that ``value`` builds on, and itself last, each as its name and its text without the key ``config``."""
    path = Path(value)
    if "\n" in value or not path.is_file():
        return [("settings", value)]  # given as text, or a wrong name, which jsonargparse reports
    if path.resolve() in seen:
        raise TypeError(f"{value} builds on itself, through {' and '.join(map(str, seen))}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TypeError(f"{value} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise TypeError(f"{value} holds no settings; a run file is a mapping such as 'trainer: {{max_steps: 100}}'")
    bases = settings.pop("config", [])
    below = []
    for base in [bases] if isinstance(bases, str) else bases:
        if not (path.parent / base).is_file():
            raise TypeError(f"{value} builds on {base}, which is not in {path.parent.resolve()}")
        below += _chain(str(path.parent / base), (*seen, path.resolve()))
    return [*below, (value, yaml.safe_dump(settings, sort_keys=False))]
