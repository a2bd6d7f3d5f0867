"""The metadata, the pinned versions and what a wheel carries."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import dydit_cli


@pytest.fixture(scope="module")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pinned(repository: Path) -> dict[str, Version]:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names inside a wheel built from the checkout, in a process of its own because the builder changes folders."""
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(out),
        str(repository),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("dydit-*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_every_requirement_is_pinned_within_its_bounds(project: dict, pinned: dict[str, Version]) -> None:
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{text} excludes {version}"


def test_torch_is_pinned_without_a_build(pinned: dict[str, Version]) -> None:
    # 2.13.0+cpu would refuse the CUDA build of the same version.
    assert pinned["torch"].local is None
    assert pinned["torch"] < Version("2.14")


def test_only_peft_has_an_upper_bound(project: dict) -> None:
    bounded = [text for text in project["dependencies"] if re.search(r"<|==|~=", text)]
    assert [Requirement(text).name for text in bounded] == ["peft"]


def test_no_requirement_brings_torchvision(project: dict, pinned: dict[str, Version]) -> None:
    assert not {"torchvision", "timm"} & set(pinned)


def test_the_version_has_one_source(project: dict) -> None:
    assert "version" in project["dynamic"]
    assert Version(dydit_cli.__version__)


def test_the_wheel_carries_recipes_data_and_base_models(repository: Path, wheel: list[str]) -> None:
    recipes = sorted((repository / "recipes").rglob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert f"dydit_cli/recipes_builtin/{recipe.relative_to(repository / 'recipes').as_posix()}" in wheel
    for asset in (repository / "dydit_cli" / "assets").rglob("*"):
        if asset.is_file() and asset.suffix != ".pyc":
            assert asset.relative_to(repository).as_posix() in wheel
    assert "dydit_cli/assets/models/dit_fmnist.pt" in wheel
    assert "dydit_cli/assets/fashion-mnist/train-images-idx3-ubyte.gz" in wheel


def test_the_wheel_carries_the_licences_and_nothing_else_from_the_root(wheel: list[str]) -> None:
    licences = {Path(name).name for name in wheel if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"dydit_cli"}
