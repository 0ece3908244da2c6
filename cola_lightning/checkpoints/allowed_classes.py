"""Look up which classes a checkpoint's hyper-parameters name, before anything is imported.

A checkpoint keeps, as plain data, the arguments that its network, optimizer and schedule were made with, the import
paths of classes among them. Whoever writes a checkpoint could name any class there, and so run any code. So only
classes of a few packages are accepted, in the places where a class belongs, with arguments that name no others.
"""

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from cola_lightning.errors import InputError

ACCEPTED = ("cola_lightning", "torch.optim", "torch.nn")
"""Packages whose classes a checkpoint may name."""
TRUST = "--trust"
"""The option that adds to them."""

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_WORD = re.compile(r"[\w+-]*")
_SCALARS = (bool, int, float, str, NoneType)
_PLAIN = {each.__name__: each for each in (bool, int, float, str, list, tuple, dict)}
_UNKNOWN = TypeVar("_UNKNOWN")
"""Stands for an annotation that is not known: numbers may be there, but neither texts nor classes."""
_DEPTH = 20


def check_named_code(
    settings: Mapping[str, Any], owner: Callable, path: Path, trusted: Collection[str] = ()
) -> dict[str, Any]:
    """Check the settings of a checkpoint that are to become arguments of ``owner``.

    Args:
        settings: Arguments by name, as they lie in the checkpoint.
        owner: A class or function with type annotations. A class may be named where one of its parameters takes an
            instance of a class, or a callable that makes one; never where it takes anything (``Any``).
        path: The checkpoint, for the message.
        trusted: Classes, or packages, that are accepted besides :data:`ACCEPTED`.

    Returns:
        The same settings, in which each class is ``{"class_path": …, "init_args": …}``.

    Raises:
        InputError: If a class is named that is not accepted, or where none belongs.
    """
    return _Check(path, tuple(trusted)).arguments(settings, owner, "--model", 0)


class _Check:
    def __init__(self, path: Path, trusted: tuple[str, ...]) -> None:
        self.path, self.trusted = path, trusted

    def refuse(self, what: str) -> InputError:
        return InputError(f"{self.path} {what}; the checkpoint is not used")

    def arguments(self, settings: Mapping[str, Any], owner: Callable, place: str, depth: int) -> dict[str, Any]:
        annotations = _annotations(owner)
        checked = {}
        for name, value in settings.items():
            if type(name) is not str:
                raise self.refuse(f"holds a setting {name!r} of {place}, whose name is no text")
            checked[name] = self.value(value, annotations.get(name, _UNKNOWN), f"{place}.{name}", depth + 1)
        return checked

    def value(self, value: Any, annotation: Any, place: str, depth: int) -> Any:
        if depth > _DEPTH:
            raise self.refuse(f"nests the settings of {place[:60]}… more than {_DEPTH} deep")
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            return self.text(value, annotation, place, depth)
        if isinstance(value, list | tuple):
            inner = _of_items(annotation)
            return [self.value(each, inner, f"{place}[{index}]", depth + 1) for index, each in enumerate(value)]
        if isinstance(value, Mapping) and _makes_a_class(annotation):
            return self.named(value, place, depth)
        if isinstance(value, Mapping) and "class_path" not in value:
            inner = _of_values(annotation)
            return {str(key): self.value(each, inner, f"{place}.{key}", depth + 1) for key, each in value.items()}
        what = f"the class {value['class_path']}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        raise self.refuse(f"names {what} for {place}, where none belongs")

    def text(self, value: str, annotation: Any, place: str, depth: int) -> Any:
        if _takes_text(annotation):
            return value  # is never looked into
        if _makes_a_class(annotation):
            return self.named({"class_path": value}, place, depth)
        # The parser would read other texts: as YAML, as the name of a file of settings, as an import path.
        if annotation is Any and _WORD.fullmatch(value):
            return value
        raise self.refuse(f"sets {place} to {value[:100]!r}, which could name code")

    def named(self, spec: Mapping[str, Any], place: str, depth: int) -> dict[str, Any]:
        """A class by its path, with its arguments."""
        name, arguments = spec.get("class_path"), spec.get("init_args") or {}
        more = spec.get("dict_kwargs") or {}  # arguments that its signature does not list
        if not isinstance(name, str) or not isinstance(arguments, Mapping) or not isinstance(more, Mapping):
            raise self.refuse(f"does not name a class by class_path for {place}")
        if unknown := spec.keys() - {"class_path", "init_args", "dict_kwargs"}:
            raise self.refuse(f"holds {', '.join(map(str, unknown))} beside the class_path of {place}")
        checked: dict[str, Any] = {"class_path": name}
        if arguments or more:
            checked["init_args"] = self.arguments({**arguments, **more}, self.found(name, place), place, depth)
        else:
            self.found(name, place)
        return checked

    def found(self, name: str, place: str) -> Callable:
        """The class that a path means. Nothing but accepted packages is imported."""
        if not self.accepts(name):
            raise self.refuse(
                f"names {name[:100]} for {place}, which is in none of {', '.join(ACCEPTED)}; if you trust whoever "
                f"wrote it, add {TRUST} {name[:100]}"
            )
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError):
            raise self.refuse(f"names {name} for {place}, which there is not") from None
        # A module holds what it imports, too: cola_lightning.provenance.subprocess is no part of this package.
        home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
        if not (inspect.isclass(found) or inspect.isfunction(found)) or not (
            self.accepts(home) or name in self.trusted
        ):
            raise self.refuse(f"names {name} for {place}, which is no class of {name.partition('.')[0]}")
        return found

    def accepts(self, name: str) -> bool:
        if not _PATH.fullmatch(name) or any(part.startswith("__") for part in name.split(".")):
            return False  # cola_lightning.__main__ would run the command line
        return any(name == each or name.startswith(f"{each}.") for each in (*ACCEPTED, *self.trusted))


def _annotations(owner: Callable) -> dict[str, Any]:
    """Collect the annotations of the parameters, but for those that have none or cannot be resolved."""
    try:
        parameters = inspect.signature(owner, eval_str=True).parameters.values()
    except (NameError, TypeError, AttributeError):  # some name is known to type checkers alone
        parameters = inspect.signature(owner).parameters.values()
    except ValueError:
        return {}
    return {each.name: _plain(each.annotation) for each in parameters if each.annotation is not each.empty}


def _plain(annotation: Any) -> Any:
    """The annotation that a text means, where it is of plain types alone."""
    if not isinstance(annotation, str):
        return annotation
    names = set(re.findall(r"[A-Za-z_]\w*", annotation))
    if names and names <= _PLAIN.keys() | {"None"} and not re.search(r"[^\w\s|,.\[\]]", annotation):
        return eval(annotation, {"__builtins__": {}}, _PLAIN)  # text of an imported package, not of the checkpoint
    return _UNKNOWN


def _members(annotation: Any) -> list[Any]:
    """List the members of a union; of any other annotation, itself."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for each in get_args(annotation) for member in _members(each)]
    return [annotation]


def _takes_text(annotation: Any) -> bool:
    """Whether a text is only ever a text here: among plain types, with none that could be looked up."""
    return all(each in _SCALARS or get_origin(each) is Literal for each in _members(annotation))


def _makes_a_class(annotation: Any) -> bool:
    """Whether it is a class, or a callable that makes one."""
    for each in _members(annotation):
        if get_origin(each) is Callable:
            each = (get_args(each) or (Any,))[-1]
        # typing.Any is a class of its own, too, since Python 3.11.
        if inspect.isclass(each) and each not in (*_SCALARS, Any, object, type, list, tuple, dict, set):
            return True
    return False


def _of_items(annotation: Any) -> Any:
    """Annotation of the items of a list or tuple, as one union; Any where the value itself may be anything."""
    items = [
        item
        for each in _members(annotation)
        if get_origin(each) not in (None, Callable, Literal, type)
        for item in get_args(each)
        if item is not Ellipsis
    ]
    return Union[tuple(items)] if items else _UNKNOWN if annotation is not Any else Any  # noqa: UP007


def _of_values(annotation: Any) -> Any:
    """Annotation of the values of a mapping; unknown where there is none."""
    values = [get_args(each)[1] for each in _members(annotation) if get_origin(each) in (dict, Mapping)]
    return Union[tuple(values)] if values else _UNKNOWN  # noqa: UP007
