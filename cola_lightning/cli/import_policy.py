"""Decide what the command line and configs may import, before it is imported.

A config names classes by their import paths, also classes that a user wrote. A config is therefore code
(docs/security.md). This policy denies what no run needs. It holds in the whole process once this module is imported.

- Python's standard library cannot be named (``subprocess.Popen``), and neither can what jsonargparse itself denies.
- Where a value may be anything (``Any``, ``object``), a mapping that looks like a class with arguments stays a mapping.
  jsonargparse would import the class and make an object.
- A module is imported only if its source binds the name that is wanted, so that naming a script does not run it.
"""

import dis
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import CodeType
from typing import Any

from jsonargparse import set_parsing_settings

from cola_lightning.private_apis.jsonargparse import (
    ImportDenied,
    check_import_path,
    keep_untyped_values,
    replace_import_check,
)

_STANDARD = sorted(name for name in sys.stdlib_module_names if name != "__future__")


def check_import(path: str, before: Any = check_import_path) -> None:
    """Refuse an import path that is denied, or that the source of its module does not bind.

    Args:
        path: Import path, such as ``torch.optim.AdamW``.
        before: jsonargparse's own check, which comes first.

    Raises:
        ImportDenied: If the path is refused. Nothing is imported before that.
    """
    before(path)
    parts = path.split(".")
    if parts[0] in sys.modules and parts[0] != "__main__":
        module = ".".join(parts[:-1])
        if module in sys.modules or len(parts) == 1:
            return  # the module is imported already, so that nothing can run
    spec, wanted = _deepest(parts)
    if spec is None or wanted is None or spec.name in sys.modules:
        return
    if not _binds(spec, wanted):
        raise ImportDenied(f"Importing '{path}' is not allowed: {spec.name} holds no {wanted}.")


def _deepest(parts: list[str]) -> tuple[ModuleSpec | None, str | None]:
    """Find the module or package that the longest possible beginning of a path names, without running anything.

    Example: ``torch.optim.AdamW`` gives the package ``torch.optim`` and the name ``AdamW``.

    Returns:
        The module's spec and the name that follows it; None for what does not exist.
    """
    try:
        spec = find_spec(parts[0])
    except (ImportError, ValueError):
        return None, None
    for depth, part in enumerate(parts[1:], 1):
        if spec is None:
            return None, None
        if spec.submodule_search_locations is None:
            return spec, part
        inner = PathFinder.find_spec(".".join(parts[: depth + 1]), list(spec.submodule_search_locations))
        if inner is None:
            return spec, part
        spec = inner
    return spec, None


def _binds(spec: ModuleSpec, name: str) -> bool:
    """Whether a module's source binds a name at its top level, as far as can be seen without running it."""
    get_source = getattr(spec.loader, "get_source", None)
    try:
        source = get_source(spec.name) if get_source else None
        code = compile(source, spec.name, "exec", dont_inherit=True) if source is not None else None
    except (ImportError, SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return False
    return code is None or _binds_any(code, {name, "__getattr__"})


def _binds_any(code: CodeType, names: set[str]) -> bool:
    """Whether the code of a module binds one of these names, or imports a module's names by ``*``.

    Functions and classes have code of their own, so that what they bind inside does not count.
    """
    return ("*",) in code.co_consts or any(
        each.opname in ("STORE_NAME", "STORE_GLOBAL") and each.argval in names for each in dis.get_instructions(code)
    )


def _install() -> None:
    set_parsing_settings(import_path_denylist=_STANDARD, instantiate_subclass_spec_in_any=False)
    replace_import_check(check_import)  # jsonargparse has no setting for this and the next line
    keep_untyped_values()


_install()
