"""`import dydit_cli` makes exports load, and imports neither torch nor diffusers to do so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dydit_cli.export.registration import HOMES, MODULE, PIPELINES, ExportedClasses, register


@pytest.fixture
def run(repository: Path) -> Callable[[str], None]:
    """Run a script in a process that has imported nothing yet."""

    def start(script: str) -> None:
        subprocess.run([sys.executable, "-c", script], cwd=repository, check=True)

    return start


def test_the_classes_are_attached_when_diffusers_comes_after_us(run: Callable[[str], None]) -> None:
    run(f"""
import sys
import dydit_cli
assert not {{"torch", "diffusers"}} & set(sys.modules)
finders = len(sys.meta_path)
import diffusers
from diffusers import pipelines
assert len(sys.meta_path) == finders - 1
assert not any(name.startswith("dydit_cli.families") for name in sys.modules), "found, but not imported before it is asked for"
from dydit_cli.families.sit import DySiTTransformer2DModel
assert getattr(pipelines, {MODULE!r}).DySiTTransformer2DModel is DySiTTransformer2DModel
assert getattr(pipelines, "dydit_cli.families.sit").DySiTTransformer2DModel is DySiTTransformer2DModel
""")


def test_the_classes_are_attached_when_diffusers_was_there_first(run: Callable[[str], None]) -> None:
    run(f"""
from diffusers import pipelines
assert not hasattr(pipelines, {MODULE!r})
import dydit_cli
assert hasattr(pipelines, {MODULE!r})
from diffusers import DiTPipeline
""")


def test_registering_again_changes_nothing() -> None:
    from diffusers import pipelines

    register()
    finders = list(sys.meta_path)
    register()
    assert sys.meta_path == finders
    assert isinstance(getattr(pipelines, MODULE), ExportedClasses)
    assert sys.modules[PIPELINES] is pipelines


def test_every_class_is_where_it_is_said_to_be() -> None:
    for name, home in HOMES.items():
        found = getattr(ExportedClasses(MODULE), name)
        assert (found.__name__, found.__module__) == (name, home)
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        ExportedClasses(MODULE).Other  # noqa: B018
