"""Private APIs of jsonargparse and argparse."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jsonargparse
from jsonargparse import _common, _completions, _completions_jsonschema, _loaders_dumpers, _typehints, _util

from cola_lightning.private_apis.expected import Expected, replace_attribute, replaced


def commands_of(parser: jsonargparse.ArgumentParser) -> dict[str, jsonargparse.ArgumentParser]:
    """Return the parser of each command."""
    action = parser._subcommands_action
    return action._name_parser_map if action else {}


def options_of(parser: jsonargparse.ArgumentParser) -> list[str]:
    """List all options of a parser, such as ``--config``."""
    return list(parser._option_string_actions)


def replace_yaml_loader(loader: type) -> None:
    """Let jsonargparse read configs and the values of flags by this loader of PyYAML."""
    replace_attribute(_loaders_dumpers, "yaml_default_loader", loader)


check_import_path = _common.check_import_path
ImportDenied = _common.ImportDenied


def replace_import_check(check: Callable[[str], None]) -> None:
    """Let jsonargparse call ``check(path)`` before it imports a path. To refuse, ``check`` raises ``ImportDenied``."""
    for module in (_util, _typehints):
        replace_attribute(module, "check_import_path", check)


def keep_untyped_values() -> None:
    """Keep jsonargparse from making an object of a mapping with ``class_path`` where a value may be anything."""
    replace_attribute(_typehints, "adapt_classes_any", lambda value, *_, **__: value)


@contextmanager
def replace_subclass_lists(change: Callable[[Callable], Callable]) -> Iterator[None]:
    """Let completion scripts and schemas list subclasses by ``change(function)``.

    ``function(cls, …)`` is jsonargparse's, which returns import paths.
    """
    changed = change(_completions.get_all_subclass_paths)
    with (
        replaced(_completions, "get_all_subclass_paths", changed),
        replaced(_completions_jsonschema, "get_all_subclass_paths", changed),
    ):
        yield


EXPECTED = (
    Expected("jsonargparse._core:ArgumentParser.add_subcommands", mentions=("_subcommands_action",)),
    Expected("jsonargparse._loaders_dumpers:get_yaml_default_loader", mentions=("yaml_default_loader",)),
    Expected("jsonargparse._common:check_import_path", "path"),
    Expected("jsonargparse._util:import_object", mentions=("check_import_path",)),
    Expected("jsonargparse._typehints:adapt_typehints", mentions=("adapt_classes_any",)),
    Expected("jsonargparse._completions:get_all_subclass_paths"),
    Expected("jsonargparse._completions_jsonschema:get_all_subclass_paths"),
)
