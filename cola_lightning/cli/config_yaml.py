"""Read YAML with the numbers of YAML 1.2, without duplicate keys, and within bounds of depth and size.

PyYAML follows YAML 1.1, in which ``1:30`` is 90 and ``010`` is 8. Here they are a text and 10, as in YAML 1.2. The
loader below replaces jsonargparse's, which reads configs and the values of flags.
"""

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, SequenceNode

from cola_lightning.private_apis.jsonargparse import replace_yaml_loader

DEPTH = 50
"""Largest depth of nesting. A whole configuration has about ten levels."""
NODES = 100_000
"""Largest number of values. An alias (``*name``) counts as all that it repeats. A whole configuration has about 300."""

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)


class ConfigFileError(yaml.YAMLError):
    """YAML that cannot be used as settings. The message is one line."""


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader, with the numbers of YAML 1.2 and bounds of depth and size."""

    def __init__(self, stream: Any) -> None:
        if isinstance(stream, str) and len(stream) > DEPTH:
            _check_depth(stream)  # before the C library recurses
        super().__init__(stream)

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return self.construct_document(node)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern]]]:
    """Return the patterns that give a scalar its type, by its first character: PyYAML's, but YAML 1.2's for numbers.

    Without a pattern for timestamps, a date stays a text.
    """
    changed = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}
    kept = {
        first: [(tag, pattern) for tag, pattern in pairs if tag not in changed]
        for first, pairs in Loader.yaml_implicit_resolvers.items()
    }
    for name, pattern, firsts in (("float", _FLOAT, "-+0123456789."), ("int", _INT, "-+0123456789")):
        whole = re.compile(f"^(?:{pattern.pattern})$")
        for first in firsts:
            kept.setdefault(first, []).append((f"tag:yaml.org,2002:{name}", whole))
    return kept


Loader.yaml_implicit_resolvers = _resolvers()


def load(text: str) -> Any:
    """Return the value of a text in YAML.

    Raises:
        yaml.YAMLError: If the text is not YAML, sets a key twice, or exceeds the bounds of depth and size.
    """
    return yaml.load(text, Loader=Loader)


def _check_depth(text: str) -> None:
    """Refuse deep nesting. Events are read one by one, without recursion."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > DEPTH:
                    raise ConfigFileError(f"line {_line(event.start_mark)} is nested more than {DEPTH} deep")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
    except yaml.MarkedYAMLError as error:
        if "nesting depth" not in str(error):  # the C library has a bound of its own, and reads ahead
            raise
        raise ConfigFileError(f"line {_line(error.problem_mark)} is nested more than {DEPTH} deep") from error


def _line(mark: Any) -> int:
    """Return the number of the line, counted from 1; 0 if it is not known."""
    return mark.line + 1 if mark else 0


def _count(node: Node, known: dict[int, int | None]) -> int:
    """Count the values of a node as if every alias were replaced, without replacing any.

    Args:
        node: The node.
        known: Counts of nodes by ``id``; None for one that is being counted, so that a cycle is noticed.
    """
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise ConfigFileError(f"line {node.start_mark.line + 1} contains itself, by an alias")
        return found
    known[id(node)] = None
    total = 1
    if isinstance(node, MappingNode):
        _check_duplicates(node)
        total += sum(_count(key, known) + _count(value, known) for key, value in node.value)
    elif isinstance(node, SequenceNode):
        total += sum(_count(each, known) for each in node.value)
    if total > NODES:
        raise ConfigFileError(f"line {node.start_mark.line + 1} grows to more than {NODES:,} values by its aliases")
    known[id(node)] = total
    return total


def _check_duplicates(node: MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key.value, str):
            raise ConfigFileError(f"line {key.start_mark.line + 1} has a list or mapping for a key")
        line = key.start_mark.line + 1
        if key.value in seen:
            raise ConfigFileError(f"line {line} sets {key.value} again, after line {seen[key.value]}; keep one of them")
        seen[key.value] = line


replace_yaml_loader(Loader)
