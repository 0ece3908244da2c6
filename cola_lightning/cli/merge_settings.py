"""Settings of a model from what is typed and from a checkpoint: what is typed wins, the rest is the checkpoint's."""

import inspect
from collections.abc import Collection, Iterator
from functools import cache
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from cola_lightning.training.module import LanguageModel

Settings = dict[str, Any]


@cache
def stand_ins() -> dict[str, str]:
    """For each argument of the model that is a class: the import path of a class that stands for its default.

    A config may set ``schedule.init_args.warmup_steps`` without naming a class, and means an argument of the default
    class. Parsed over the stand-in, which takes the same arguments, it tells whether a class was named.
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
    """The settings of the checkpoint, with what was typed in their place. A class comes with all its arguments.

    Example: stored is SGD with lr 0.1 and momentum 0.9. Typed "lr 0.2" without a class gives SGD with lr 0.2 and
    momentum 0.9, and so does typed "SGD, lr 0.2". Typed "AdamW, lr 0.2" gives AdamW with lr 0.2.

    Args:
        stored: Of the checkpoint, by name; classes as ``{"class_path": …, "init_args": …}``.
        typed: In the same form, nothing but what was typed.
        unnamed: Import paths of classes which say that none was named.
        place: Where the settings stand, for messages.
    """
    merged = dict(stored)
    for name, value in typed.items():
        if callable(value):
            merged.pop(name, None)  # a function by its import path, which the parser has found
        elif not (_is_class(value) and _is_class(stored.get(name))):
            merged[name] = value
        else:
            merged[name] = _merge_class(stored[name], value, unnamed, f"{place}.{name}")
    # What is left of the stand-ins: the checkpoint knows nothing of an argument that is a class, nor was one named.
    return {name: value for name, value in merged.items() if not (unnamed and _is_class(value, unnamed))}


def _merge_class(stored: Settings, typed: Settings, unnamed: Collection[str], place: str) -> Settings:
    named = typed["class_path"] not in unnamed
    if named and typed["class_path"] != stored["class_path"]:
        return typed
    before, now = stored.get("init_args") or {}, typed.get("init_args") or {}
    if not named:
        # Arguments of the default class, from a config: they fit the class of the checkpoint, or mean nothing to it.
        for name in [name for name in now if name not in before]:
            rank_zero_warn(
                f"{place}.{name} is left out, for {stored['class_path'].rpartition('.')[2]}, which comes from the "
                f"checkpoint, has no such option; to change the class, set {place}"
            )
        now = {name: value for name, value in now.items() if name in before}
    return {"class_path": stored["class_path"], "init_args": merge_settings(before, now, (), place)}


def differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each setting of ``old`` that is another in ``new``: its place, what it was, what it is."""
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
    """Whether these are the settings of a class, and if ``paths`` are given, of one of them."""
    return isinstance(value, dict) and "class_path" in value and (not paths or value["class_path"] in paths)
