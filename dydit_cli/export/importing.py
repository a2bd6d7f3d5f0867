"""Import what was written, to run it: nothing of that stays in this process, and nothing in the folder."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def imported(name: str, file: Path) -> Iterator[ModuleType]:
    """Import a file for as long as the block lasts.

    Python's compiled copies would lie in the export, be uploaded with it, and name a temporary folder of this machine: none are
    made.

    Args:
        name: That nothing else uses.
        file: A module, or the ``__init__.py`` of a package, whose submodules become its attributes.
    """
    places = [str(file.parent)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=places)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.dont_write_bytecode = writes
        for each in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
            del sys.modules[each]
