"""Check the classes that a checkpoint's hyper-parameters name, before anything is imported.

A checkpoint keeps the arguments of its network, optimizer and schedule as plain data. Import paths of classes are among
them. The author of a checkpoint could name any class there, and so run any code. Therefore only classes of a few
packages are accepted, only where a class belongs, and only with arguments that name no others.
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
"""Packages of the classes that a checkpoint may name."""
TRUST = "--trust"
"""The option that adds packages or classes to them."""

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_WORD = re.compile(r"[\w+-]*")
_SCALARS = (bool, int, float, str, NoneType)
_PLAIN = {each.__name__: each for each in (bool, int, float, str, list, tuple, dict)}
_UNKNOWN = TypeVar("_UNKNOWN")
"""Placeholder for an annotation that is not known. Numbers are accepted there, but neither texts nor classes."""
_DEPTH = 20
"""Largest depth of nested settings."""


def check_named_code(
    settings: Mapping[str, Any], owner: Callable, path: Path, trusted: Collection[str] = ()
) -> dict[str, Any]:
    """Check the settings of a checkpoint that will become arguments of ``owner``.

    Args:
        settings: Arguments by name, as the checkpoint has them.
        owner: A class or function with type annotations. A class may be named where a parameter takes an instance of
            a class, or a callable that makes one. It may not be named where a parameter takes anything (``Any``).
        path: The checkpoint, for the message.
        trusted: Classes or packages that are accepted in addition to :data:`ACCEPTED`.

    Returns:
        The same settings, in which each class is ``{"class_path": …, "init_args": …}``.

    Raises:
        InputError: If a class is named that is not accepted, or in a place where no class belongs.
    """
    return _Check(path, tuple(trusted)).arguments(settings, owner, "--model", 0)


class _Check:
    """Check nested settings. Each method takes a value, its annotation, its place for the message, and its depth."""

    def __init__(self, path: Path, trusted: tuple[str, ...]) -> None:
        self.path, self.trusted = path, trusted

    def refuse(self, what: str) -> InputError:
        """Make the error for a checkpoint that does ``what``."""
        return InputError(f"{self.path} {what}; the checkpoint is not used")

    def arguments(self, settings: Mapping[str, Any], owner: Callable, place: str, depth: int) -> dict[str, Any]:
        """Check the arguments of a class or function."""
        annotations = _annotations(owner)
        checked = {}
        for name, value in settings.items():
            if type(name) is not str:
                raise self.refuse(f"holds a setting {name!r} of {place}, with a name that is not a text")
            checked[name] = self.value(value, annotations.get(name, _UNKNOWN), f"{place}.{name}", depth + 1)
        return checked

    def value(self, value: Any, annotation: Any, place: str, depth: int) -> Any:
        """Check a value of any type."""
        if depth > _DEPTH:
            raise self.refuse(f"nests the settings of {place[:60]}… more than {_DEPTH} deep")
        # From harmless to harmful: numbers; texts, which may name a class; lists of values; then mappings. A mapping is
        # {"class_path": "cola_lightning.methods.CoLA", "init_args": {"rank": 128}} where a class belongs, and any other
        # settings, such as {"rope_type": "linear", "factor": 2.0}, elsewhere.
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
        """Check a text, which may be the import path of a class."""
        if _takes_text(annotation):
            return value  # nothing interprets it
        if _makes_a_class(annotation):
            return self.named({"class_path": value}, place, depth)
        # A single word is harmless. The parser would interpret other texts: as YAML, as the name of a config, or as an
        # import path.
        if annotation is Any and _WORD.fullmatch(value):
            return value
        raise self.refuse(f"sets {place} to {value[:100]!r}, which could name code")

    def named(self, spec: Mapping[str, Any], place: str, depth: int) -> dict[str, Any]:
        """Check a class that is named by its path, with its arguments."""
        name, arguments = spec.get("class_path"), spec.get("init_args") or {}
        more = spec.get("dict_kwargs") or {}  # arguments that the signature of the class does not list
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
        """Import a class by its path, if its package is accepted."""
        if not self.accepts(name):
            raise self.refuse(
                f"names {name[:100]} for {place}, which is in none of {', '.join(ACCEPTED)}; if you trust whoever "
                f"wrote it, add {TRUST} {name[:100]}"
            )
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError):
            raise self.refuse(f"names {name} for {place}, which does not exist") from None
        # A module also has as attributes what it imports: cola_lightning.provenance.subprocess is not of this package.
        # So check the module that defines the class, too.
        home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
        if not (inspect.isclass(found) or inspect.isfunction(found)) or not (
            self.accepts(home) or name in self.trusted
        ):
            raise self.refuse(f"names {name} for {place}, which is not a class of {name.partition('.')[0]}")
        return found

    def accepts(self, name: str) -> bool:
        """Say whether an import path is in an accepted or trusted package."""
        if not _PATH.fullmatch(name) or any(part.startswith("__") for part in name.split(".")):
            return False  # cola_lightning.__main__ would run the command line
        return any(name == each or name.startswith(f"{each}.") for each in (*ACCEPTED, *self.trusted))


def _annotations(owner: Callable) -> dict[str, Any]:
    """Collect the annotations of parameters; an annotation that cannot be resolved becomes ``_UNKNOWN``."""
    try:
        parameters = inspect.signature(owner, eval_str=True).parameters.values()
    except (NameError, TypeError, AttributeError):  # a name is imported for type checkers only
        parameters = inspect.signature(owner).parameters.values()
    except ValueError:
        return {}
    return {each.name: _plain(each.annotation) for each in parameters if each.annotation is not each.empty}


def _plain(annotation: Any) -> Any:
    """Resolve an annotation that is a text, if it names plain types only; others become ``_UNKNOWN``."""
    if not isinstance(annotation, str):
        return annotation
    names = set(re.findall(r"[A-Za-z_]\w*", annotation))
    if names and names <= _PLAIN.keys() | {"None"} and not re.search(r"[^\w\s|,.\[\]]", annotation):
        return eval(annotation, {"__builtins__": {}}, _PLAIN)  # this text is of a package, not of the checkpoint
    return _UNKNOWN


def _members(annotation: Any) -> list[Any]:
    """List the members of a union. For another annotation, list itself."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for each in get_args(annotation) for member in _members(each)]
    return [annotation]


def _takes_text(annotation: Any) -> bool:
    """Say whether a text stays a text under this annotation, because it has only plain types and literals."""
    return all(each in _SCALARS or get_origin(each) is Literal for each in _members(annotation))


def _makes_a_class(annotation: Any) -> bool:
    """Say whether an annotation is a class, or a callable that makes an instance of one."""
    for each in _members(annotation):
        # Of Callable[[int, int], Projection], what it returns decides: Projection.
        if get_origin(each) is Callable:
            each = (get_args(each) or (Any,))[-1]
        # typing.Any is itself a class since Python 3.11.
        if inspect.isclass(each) and each not in (*_SCALARS, Any, object, type, list, tuple, dict, set):
            return True
    return False


def _of_items(annotation: Any) -> Any:
    """Make the annotation of the items of a list or tuple, as one union. The items of Any are Any."""
    # Examples: list[int | str] gives int | str, and tuple[float, ...] gives float. The arguments of Callable, Literal
    # and type are not annotations of items.
    items = [
        item
        for each in _members(annotation)
        if get_origin(each) not in (None, Callable, Literal, type)
        for item in get_args(each)
        if item is not Ellipsis
    ]
    return Union[tuple(items)] if items else _UNKNOWN if annotation is not Any else Any  # noqa: UP007


def _of_values(annotation: Any) -> Any:
    """Make the annotation of the values of a mapping; ``_UNKNOWN`` if the annotation is of no mapping."""
    # Example: dict[str, bool | int] | None gives bool | int.
    values = [get_args(each)[1] for each in _members(annotation) if get_origin(each) in (dict, Mapping)]
    return Union[tuple(values)] if values else _UNKNOWN  # noqa: UP007
