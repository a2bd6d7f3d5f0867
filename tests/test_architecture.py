"""Rules on imports that import-linter cannot state, because it sees a third-party package only as a whole."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


def imported_names(path: Path) -> Iterator[str]:
    """Full dotted names of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def users(package: Path, wanted: str) -> set[str]:
    """The rooms (top-level modules) of the package that import a name starting with, or ending in, ``wanted``."""
    found = set()
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if any(name == wanted or name.startswith(f"{wanted}.") for name in imported_names(path)):
            found.add(room)
    return found


def scheduler_users(package: Path) -> set[str]:
    """The rooms that import diffusers' schedulers, by module or by class."""
    found = users(package, "diffusers.schedulers")
    for path in package.rglob("*.py"):
        names = [name for name in imported_names(path) if name.startswith("diffusers.")]
        if any(name.endswith("Scheduler") for name in names):
            found.add(path.relative_to(package).parts[0].removesuffix(".py"))
    return found


@pytest.fixture(scope="module")
def package(repository: Path) -> Path:
    return repository / "dydit_cli"


def test_only_sampling_and_export_know_the_schedulers(package: Path) -> None:
    # sampling steps them; export writes their configuration into a pipeline's folder.
    assert scheduler_users(package) <= {"sampling", "export"}


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("fvcore", {"profiling"}),
        ("torchdiffeq", {"sampling"}),
        # Heads of model cards are YAML: checkpoints read them, exports write them.
        ("yaml", {"recipe", "artifacts", "cli", "checkpoints", "export"}),
        ("pydantic", {"recipe"}),
        ("torchvision", set()),
        ("timm", set()),
    ],
)
def test_libraries_are_known_where_they_are_used(package: Path, library: str, rooms: set[str]) -> None:
    assert users(package, library) <= rooms


def test_the_search_for_imports_finds_them(tmp_path: Path) -> None:
    """The two rules above would pass on a search that finds nothing."""
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("def f():\n    from diffusers import DDPMScheduler\n")
    (tmp_path / "b.py").write_text("import yaml.nodes\n")
    assert scheduler_users(tmp_path) == {"room"}
    assert users(tmp_path, "yaml") == {"b"}
    assert users(tmp_path, "yam") == set()
