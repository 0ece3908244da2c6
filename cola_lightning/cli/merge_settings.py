"""Merge the settings of a model that are typed with those of a checkpoint. What is typed wins."""

import inspect
from collections.abc import Collection, Iterator
from functools import cache
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from cola_lightning.training.module import LanguageModel

Settings = dict[str, Any]


@cache
def stand_ins() -> dict[str, str]:
    """Make a subclass of each default of the model's arguments that is a class, and return their import paths.

    A config may set ``schedule.init_args.warmup_steps`` without naming a class. It then means an argument of the
    default class. The config is parsed with the subclass as the default, which takes the same arguments. The result
    names the subclass if the config named no class.
    """
    paths = {}
    for name, parameter in inspect.signature(LanguageModel).parameters.items():
        if isinstance(default := parameter.default, type):
            stand_in = type(f"Default{default.__name__}", (default,), {"__module__": __name__})
            globals()[stand_in.__name__] = stand_in  # where the parser imports it from
            paths[name] = f"{__name__}.{stand_in.__name__}"
    return paths


def merge_settings(
    stored: Settings, typed: Settings, unnamed: Collection[str] = (), place: str = "--model"
) -> Settings:
    """Return the settings of the checkpoint, replaced by those that were typed.

    A class of another name replaces the class with all its arguments. Example: the checkpoint has SGD with lr 0.1 and
    momentum 0.9. To type "lr 0.2" without a class gives SGD with lr 0.2 and momentum 0.9, and so does "SGD, lr 0.2".
    To type "AdamW, lr 0.2" gives AdamW with lr 0.2.

    Args:
        stored: Settings of the checkpoint, by name; classes as ``{"class_path": …, "init_args": …}``.
        typed: Settings that were typed, in the same form, without defaults.
        unnamed: Import paths which mean that no class was named, see :func:`stand_ins`.
        place: Flag of these settings, for messages.
    """
    merged = dict(stored)
    for name, value in typed.items():
        if callable(value):
            merged.pop(name, None)  # a function, which the parser found by its import path
        elif not (_is_class(value) and _is_class(stored.get(name))):
            merged[name] = value
        else:
            merged[name] = _merge_class(stored[name], value, unnamed, f"{place}.{name}")
    # Remove the stand-ins that are left: no class was named for them, and the checkpoint has no such argument.
    return {name: value for name, value in merged.items() if not (unnamed and _is_class(value, unnamed))}


def _merge_class(stored: Settings, typed: Settings, unnamed: Collection[str], place: str) -> Settings:
    named = typed["class_path"] not in unnamed
    if named and typed["class_path"] != stored["class_path"]:
        return typed
    before, now = stored.get("init_args") or {}, typed.get("init_args") or {}
    if not named:
        # A config has arguments of the default class. Those that the checkpoint's class lacks are left out.
        for name in [name for name in now if name not in before]:
            rank_zero_warn(
                f"{place}.{name} is left out, because {stored['class_path'].rpartition('.')[2]}, the checkpoint's "
                f"class, has no such option; to change the class, set {place}"
            )
        now = {name: value for name, value in now.items() if name in before}
    return {"class_path": stored["class_path"], "init_args": merge_settings(before, now, (), place)}


def differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the place, the old and the new value of each setting of ``old`` that differs in ``new``."""
    if _is_class(old) and _is_class(new):
        if old["class_path"] != new["class_path"]:
            yield place, old["class_path"], new["class_path"]
            return
        old, new = old.get("init_args") or {}, new.get("init_args") or {}
    if isinstance(old, dict) and isinstance(new, dict):
        for name, value in old.items():
            yield from differences(value, new.get(name), f"{place}.{name}".lstrip("."))
    elif old != new:
        yield place, old, new


def _is_class(value: Any, paths: Collection[str] = ()) -> bool:
    """Whether these are the settings of a class; with ``paths``, of one of these classes."""
    return isinstance(value, dict) and "class_path" in value and (not paths or value["class_path"] in paths)
