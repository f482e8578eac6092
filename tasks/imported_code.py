"""What a user's module rests on: other modules of the user's, and libraries with their versions.

Looked for in what the module has at its top when it has been imported; an import inside a function is not seen.
"""

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from types import ModuleType

__all__ = ["ImportedCode", "imported_code"]

_OURS = frozenset(("deployments", "flows", "nearline", "storage", "streaming", "tasks"))
_LIBRARY_FOLDERS = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class ImportedCode:
    """modules : with a source that no version stands for, by name. versions : of libraries, by distribution."""

    modules: tuple[ModuleType, ...]
    versions: dict[str, str]


@functools.cache
def imported_code(module: ModuleType) -> ImportedCode:
    """Look once, early: the files may be changed under a running worker.

    Modules of the user's own are looked through in turn; of ours those that are named count, and no further.
    """
    own: dict[str, ModuleType] = {}
    libraries: set[str] = set()
    waiting = [module]
    while waiting:
        for found in _imports(waiting.pop()):
            top = found.__name__.partition(".")[0]
            if found is module or found.__name__ in own or top in sys.stdlib_module_names:
                continue
            if _is_library(found):
                libraries.add(top)
            elif _has_source(found):
                own[found.__name__] = found
                if top not in _OURS:
                    waiting.append(found)
    return ImportedCode(tuple(own[name] for name in sorted(own)), _versions(libraries))


def _imports(module: ModuleType) -> Iterator[ModuleType]:
    """The modules among a module's values, and those that its other values come from."""
    for value in list(vars(module).values()):
        if isinstance(value, ModuleType):
            yield value
        elif isinstance(name := getattr(value, "__module__", None), str) and name in sys.modules:
            yield sys.modules[name]


def _is_library(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None) or ""
    return any(f"/{folder}/" in file.replace("\\", "/") for folder in _LIBRARY_FOLDERS)


def _has_source(module: ModuleType) -> bool:
    try:
        return bool(inspect.getsource(module))
    except (OSError, TypeError):  # built in, or compiled; or a folder of modules without a file of its own
        return False


def _versions(libraries: set[str]) -> dict[str, str]:
    """By distribution: a package may be installed under another name."""
    found: dict[str, str] = {}
    for name in sorted({dist for top in libraries for dist in _distributions().get(top, [top])}):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return {top: sorted(set(names)) for top, names in packages_distributions().items()}
