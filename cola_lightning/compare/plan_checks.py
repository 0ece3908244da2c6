"""Refuse a plan that cannot work, before anything is trained."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_lightning.errors import InputError

if TYPE_CHECKING:
    from cola_lightning.compare.plan import Method  # plan imports this module

MOST_SEARCH_TRIALS = 20


def check_lists(**lists: list[Any] | None) -> None:
    """Refuse a list that is empty or repeats itself. One that is not given is None."""
    for name, values in lists.items():
        if values is not None:
            _check_distinct(name, values)


def check_rates(methods: Mapping[str, "Method"], **common: list[float]) -> None:
    """Refuse rates that are not above 0, and a method's own that are not as many as the plan's.

    Args:
        methods: The methods, by name.
        common: The plan's rates, by the name of the argument.
    """
    for name, method in methods.items():
        for argument, rates in common.items():
            own = getattr(method, argument)
            if own is not None:
                _check_distinct(f"{argument} of {name}", own)
                if len(own) != len(rates):
                    raise InputError(
                        f"{argument} of {name} has {len(own)} values, but the plan's has {len(rates)}; every "
                        f"method must have the same number of trials"
                    )
            if min(own or rates) <= 0:
                raise InputError(f"{argument} is {own or rates}; each rate must be above 0")


def check_budgets(budgets: list[int] | None) -> None:
    if min(budgets or [1]) < 1:
        raise InputError(f"budgets is {budgets}; each is a number of tokens above 0")


def check_search(search_trials: int, beta2: list[float], finalists: int) -> None:
    """Refuse numbers of trials and values of β2 out of range, and more values than the grid and the search can try."""
    if not all(0 < value < 1 for value in beta2):
        raise InputError(f"beta2 is {beta2}; each value must be between 0 and 1")
    if not 0 <= search_trials <= MOST_SEARCH_TRIALS:
        raise InputError(f"search_trials is {search_trials}; it must be from 0 to {MOST_SEARCH_TRIALS}")
    if not 1 <= finalists <= MOST_SEARCH_TRIALS:
        raise InputError(f"finalists is {finalists}; it must be from 1 to {MOST_SEARCH_TRIALS}")
    if len(beta2) > 1 + search_trials:
        raise InputError(
            f"beta2 has {len(beta2)} values, but only search_trials reach those after the first, "
            f"and these are {search_trials}; raise search_trials"
        )


def check_names(folders: Mapping[str, str], baseline: str | None) -> None:
    """Refuse methods that would share a folder, and a baseline that is none of them.

    Args:
        folders: Names of the methods' folders, by method.
        baseline: Name of a method; None if not given.
    """
    if len(set(folders.values())) < len(folders):
        raise InputError(f"two of the methods {list(folders)} would share a folder; rename one")
    if baseline is not None and baseline not in folders:
        raise InputError(f"baseline is {baseline!r}, which is not one of the methods {list(folders)}")


def check_files(files: Iterable[str]) -> None:
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"{file} does not exist; name configs relative to {Path.cwd()}")


def check_results_can_be_read(method: str, config: dict[str, Any]) -> None:
    """Refuse settings under which a run ends without what its result is read from.

    That is the validation of its last step, in the events of the default logger, and its last checkpoint.

    Args:
        method: Name of the method.
        config: Its whole configuration.

    Raises:
        InputError: Names the first such setting.
    """
    trainer, dirpath = config["trainer"], (config.get("checkpoint") or {}).get("dirpath")
    faults = {
        "limit_val_batches": (trainer.get("limit_val_batches") == 0, "validates nothing"),
        "fast_dev_run": (bool(trainer.get("fast_dev_run")), "stores nothing"),
        "barebones": (bool(trainer.get("barebones")), "stores nothing"),
        "enable_checkpointing": (trainer.get("enable_checkpointing") is False, "stores no checkpoint"),
        "logger": (trainer.get("logger") not in (None, True), "logs where a comparison does not read"),
    }
    for name, (is_fault, consequence) in faults.items():
        if is_fault:
            raise InputError(
                f"{method} has trainer.{name} {trainer[name]}, with which a run {consequence}; a result is read from "
                f"the last validation, the default logger's events and the last checkpoint; leave trainer.{name} out"
            )
    if dirpath is not None:
        raise InputError(f"{method} has checkpoint.dirpath {dirpath}, which all runs would share; leave it out")


def _check_distinct(name: str, values: list[Any]) -> None:
    if not values or len(set(values)) < len(values):
        raise InputError(f"{name} is {values}; it must name at least one, and none twice")
