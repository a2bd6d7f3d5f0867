"""A user's file: what it adds, what is recorded of it, and that nothing else than the user's word runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dydit_cli
from dydit_cli.cli.app import main
from dydit_cli.conversion.importance import PLUGGED_RANKINGS
from dydit_cli.dynamic.routers import WIDTHS
from dydit_cli.errors import DyditError
from dydit_cli.flops import count_macs
from dydit_cli.plugged import IN_USE
from dydit_cli.plugins import load_plugin
from dydit_cli.training.deciding import DECIDING
from tests.export.artifacts import exported, static_checkpoint
from tests.flux_parts import saved_flux
from tests.tiny import relative_difference, tiny_inputs, tiny_model

REGISTRIES = (WIDTHS, PLUGGED_RANKINGS, DECIDING, IN_USE)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """What a test adds goes with it."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, held in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(held)  # type: ignore[arg-type]
    for name in [name for name in sys.modules if name.startswith("dydit_plugin_")]:
        del sys.modules[name]


def unloaded() -> None:
    """Forget every plug-in, as another process would not know it."""
    for registry in (WIDTHS, PLUGGED_RANKINGS, DECIDING):
        for name in ("unit", "l1", "heads"):
            registry.pop(name, None)  # type: ignore[attr-defined]
    IN_USE.clear()


@pytest.fixture
def example(repository: Path) -> Path:
    return repository / "examples" / "my_router.py"


def converted(folder: Path, example: Path, *words: str) -> Path:
    """A model with the example's routers, made on the command line."""
    static_checkpoint(folder / "s.pt")
    checkpoint = ["--checkpoint", str(folder / "s.pt"), "--family", "dit", "--num-heads", "6"]
    out = ["--out", str(folder / "c")]
    assert main(["convert", "--plugin", str(example), *checkpoint, *out, "width=unit", *words]) == 0
    return folder / "c"


def test_the_page_shows_the_example(repository: Path, example: Path) -> None:
    text = (repository / "docs" / "plugins.md").read_text(encoding="utf-8")
    assert f"```python\n{example.read_text(encoding='utf-8')}```" in text
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 40


def test_what_is_made_with_it_says_so(tmp_path: Path, example: Path) -> None:
    folder = converted(tmp_path, example, "importance=l1")
    manifest = json.loads((folder / "manifest.json").read_text())
    (recorded,) = manifest["plugins"]
    assert recorded["name"] == "my_router.py"
    assert len(recorded["sha256"]) == 64
    assert recorded["provides"] == ["width unit", "ranking l1", "routers heads"]
    assert json.loads((folder / "config.json").read_text())["width"] == "unit"
    assert json.loads((folder / "report.json").read_text())["importance"] == "l1"
    model = dydit_cli.load_model(folder)
    assert type(model.dynamic_blocks[0].head_router).__name__ == "UnitHeadRouter"


def test_without_it_the_model_says_what_is_missing(tmp_path: Path, example: Path) -> None:
    folder = converted(tmp_path, example)
    unloaded()
    with pytest.raises(DyditError, match=r"--plugin my_router\.py") as error:
        dydit_cli.load_model(folder)
    assert "sha256" in error.value.why
    assert main(["profile", "--model", str(folder), "latency=false"]) == 2
    load_plugin(example)
    assert dydit_cli.load_model(folder).config["width"] == "unit"


def test_another_version_of_it_is_a_warning(tmp_path: Path, example: Path) -> None:
    folder = converted(tmp_path, example)
    unloaded()
    changed = tmp_path / "my_router.py"
    changed.write_text(example.read_text(encoding="utf-8") + "# changed\n")
    load_plugin(changed)
    with pytest.warns(UserWarning, match="another version of the plug-in"):
        dydit_cli.load_model(folder)


def test_a_baked_export_does_without_it(tmp_path: Path, example: Path) -> None:
    folder = converted(tmp_path, example)
    exported(folder, tmp_path / "e", "baked", steps=3)
    unloaded()
    assert dydit_cli.load_model(tmp_path / "e").config["width"] == "free"


def test_its_routers_agree_in_dense_and_compact_execution(example: Path) -> None:
    load_plugin(example)
    model = tiny_model("dit", width="unit")
    sample, times, labels = tiny_inputs(model)
    with torch.no_grad():
        dense, compact = (
            model.set_execution(name)(sample, times, labels).sample for name in ("dense", "compact")
        )
    assert relative_difference(compact, dense) < 1e-5
    assert 0 < float(model.routing(times).heads.mean()) < 1
    # A linear layer, as the package's own: the count is theirs.
    assert (
        count_macs(model, model.routing(0.5)).routers
        == count_macs(tiny_model("dit"), tiny_model("dit").routing(0.5)).routers
    )


def test_its_baseline_is_one_to_train(tmp_path: Path, example: Path) -> None:
    from dydit_cli.training import fine_tune
    from tests.training.runs import settings_for

    load_plugin(example)
    result = fine_tune(settings_for(tmp_path, routers="heads", target_ratio=0.7, router_learning_rate=0.5))
    assert result.groups == result.tokens == 1.0


def test_its_routers_are_not_exported_with_code(tmp_path: Path, example: Path) -> None:
    folder = converted(tmp_path, example)
    for kind in ("diffusers", "original"):
        with pytest.raises(DyditError, match="plug-in of yours"):
            exported(folder, tmp_path / "x", kind)
    assert exported(folder, tmp_path / "s", "static").files


def test_nor_are_those_of_a_flux(tmp_path: Path, example: Path) -> None:
    load_plugin(example)
    folder = saved_flux(tmp_path / "m", width="unit")
    for kind in ("diffusers", "original", "comfyui"):
        with pytest.raises(DyditError, match="plug-in of yours"):
            exported(folder, tmp_path / "x", kind)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = 1\n", "registers nothing"),
        ("import nowhere_at_all\n", "ModuleNotFoundError, line 1 of mine.py"),
        ("def register(plugin):\n    1 / 0\n", "ZeroDivisionError, line 2 of mine.py"),
        ("def register(plugin):\n    plugin.add_ranking('taylor', None)\n", "which there is already"),
        ("def register(plugin):\n    plugin.add_width('w', int, int)\n", "subclasses of HeadRouter"),
    ],
)
def test_a_faulty_file_is_explained(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(DyditError, match=complaint):
        load_plugin(tmp_path / "mine.py")
    assert "mine.py" not in IN_USE


def test_a_missing_file_or_name_ends_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list", "--plugin", str(tmp_path / "none.py")]) == 2
    assert "There is no plug-in" in capsys.readouterr().err
    assert main(["recipes", "list", "--plugin"]) == 2
    assert "names no file" in capsys.readouterr().err


def test_no_recipe_can_name_one(tmp_path: Path, example: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"schema: 1\nname: r\nconvert:\n  checkpoint: a\n  out: b\n  plugin: {example}\n")
    assert main(["recipes", "validate", str(recipe)]) == 2
    assert not IN_USE


@pytest.mark.slow
def test_the_example_passes_the_contract_tests(repository: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.plugins.with_example",
    ]
    chosen = ["tests/contract", "-k", "(dit or sit) and not ordered and not budget"]
    found = subprocess.run(
        [*command, *chosen],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-3000:]
