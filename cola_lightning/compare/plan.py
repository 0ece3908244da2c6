"""What is to be compared: methods, learning rates and seeds, as trials that each are one training run."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cola_lightning.errors import InputError

Flag = bool | int | float | str | None

Resolve = Callable[[list[str]], dict[str, Any]]
"""``f(flags)`` is the whole configuration that ``fit`` makes of these flags."""


@dataclass
class Method:
    """One of the things compared.

    Args:
        configs: Configs over the plan's own, such as ``configs/method/cola.yaml``.
        flags: What comes on top of them, as on the command line; for instance ``model.projection.rank: 32``.
    """

    configs: list[str] = field(default_factory=list)
    flags: dict[str, Flag] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One training run. ``factor`` multiplies the method's learning rates; None for the best of the sweep."""

    number: int
    method: str
    factor: float | None
    seed: int


class Plan:
    """The trials of a comparison: for each method every learning rate with the first seed, then, at the best of them,
    the other seeds.

    Args:
        configs: Configs that all methods build on.
        flags: What comes on top of all files and methods' own flags.
        methods: What is compared, by name.
        learning_rates: Factors of the learning rate that a method's own files give.
        seeds: The first is the sweep's.
        resolve: Makes a whole configuration.

    Raises:
        InputError: If a list is empty or repeats itself, two names make one folder, or a file is missing.
    """

    def __init__(
        self,
        configs: list[str],
        flags: dict[str, Flag],
        methods: dict[str, Method],
        learning_rates: list[float],
        seeds: list[int],
        resolve: Resolve,
    ) -> None:
        for name, values in (("methods", list(methods)), ("learning_rates", learning_rates), ("seeds", seeds)):
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} is {values}; it must name at least one, and none twice")
        if min(learning_rates) <= 0:
            raise InputError(f"learning_rates {learning_rates} are factors; each must be above 0")
        folders = [folder_name(method) for method in methods]
        if len(set(folders)) < len(folders):
            raise InputError(f"two of the methods {list(methods)} would share a folder; rename one")
        for file in [*configs, *(file for method in methods.values() for file in method.configs)]:
            if not Path(file).is_file():
                raise InputError(f"{file} does not exist; name configs relative to {Path.cwd()}")
        self.configs, self.common, self.methods = configs, flags, methods
        self.learning_rates, self.seeds, self.resolve = sorted(learning_rates), seeds, resolve
        trials = [(name, factor, seeds[0]) for name in methods for factor in self.learning_rates]
        again = [(name, None, seed) for name in methods for seed in seeds[1:]]
        self.trials = [Trial(number, *trial) for number, trial in enumerate(trials + again)]
        self._resolved: dict[str, dict[str, Any]] = {}

    def flags(self, method: str) -> list[str]:
        """Of the command line, for a method as its files have it."""
        chosen = self.methods[method]
        files = [f"--config={file}" for file in [*self.configs, *chosen.configs]]
        return files + [f"--{name}={as_text(value)}" for name, value in (chosen.flags | self.common).items()]

    def configuration(self, method: str, factor: float, seed: int, run_dir: Path) -> dict[str, Any]:
        """The whole configuration of a training run."""
        if method not in self._resolved:
            self._resolved[method] = self.resolve(self.flags(method))
        config = yaml.safe_load(yaml.safe_dump(self._resolved[method]))  # a copy
        scale_learning_rates(config["model"]["optimizer"], factor)
        return config | {"seed_everything": seed, "run_dir": str(run_dir)}


def as_text(value: Flag) -> str:
    """As one would type it."""
    return value if isinstance(value, str) else json.dumps(value)


def folder_name(method: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-")


def scale_learning_rates(optimizer: dict[str, Any], factor: float) -> None:
    """Multiply every ``lr`` in the settings of an optimizer, be it one or made of several."""
    for key, value in optimizer.items():
        if key == "lr":
            optimizer[key] = float(f"{value * factor:.6g}")
        elif isinstance(value, dict):
            scale_learning_rates(value, factor)


def learning_rates(optimizer: dict[str, Any]) -> list[float]:
    """Every ``lr`` in the settings of an optimizer, each value once."""
    found = []
    for key, value in optimizer.items():
        if key == "lr":
            found.append(value)
        elif isinstance(value, dict):
            found += learning_rates(value)
    return list(dict.fromkeys(found))
