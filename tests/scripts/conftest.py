"""The set-up logic is a script, not a module of the package: load it from its file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def environment(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A fresh copy of scripts/environment.py, with none of the variables that steer it."""
    for name in ("DYDIT_PYTHON", "DYDIT_USE_CURRENT"):
        monkeypatch.delenv(name, raising=False)
    path = repository / "scripts" / "environment.py"
    spec = importlib.util.spec_from_file_location("dydit_scripts_environment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module
