"""The sh scripts: which Python they choose, what they say without one, and that they hand everything over."""

from __future__ import annotations

import ast
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="sh scripts are for POSIX systems")


def fake_python(path: Path, *, new_enough: bool, makes_environments: bool = True) -> None:
    """A stand-in that answers the two questions of python.sh and otherwise prints its name and arguments."""
    path.write_text(
        "#!/bin/sh\n"
        'case "$1 $2" in\n'
        f'    "-c import sys"*) exit {0 if new_enough else 1} ;;\n'
        f'    "-c import ensurepip"*) exit {0 if makes_environments else 1} ;;\n'
        "esac\n"
        'printf "%s" "$(basename "$0")"; printf "|%s" "$@"; printf "\\n"\n'
        "exit 5\n"
    )
    path.chmod(0o755)


@pytest.fixture
def path_folder(tmp_path: Path) -> Path:
    """A folder with the few programs that the scripts call, to be the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("dirname", "basename"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def call(
    script: Path, path_folder: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which(variables.pop("SHELL_NAME", "sh")) or "sh", str(script), *arguments],
        env={"PATH": str(path_folder), **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["demo", "test"])
def test_the_script_hands_over_to_its_python_twin(
    repository: Path, path_folder: Path, shell: str, name: str
) -> None:
    fake_python(path_folder / "python3", new_enough=True)
    done = call(repository / "scripts" / name, path_folder, "--a b", "c", SHELL_NAME=shell)
    assert done.stdout == f"python3|{repository / 'scripts' / name}.py|--a b|c\n"
    assert done.returncode == 5


def test_an_old_python3_is_passed_over(repository: Path, path_folder: Path) -> None:
    fake_python(path_folder / "python3", new_enough=False)
    fake_python(path_folder / "python3.12", new_enough=True)
    assert call(repository / "scripts/demo", path_folder).stdout.startswith("python3.12|")


def test_a_python_that_makes_environments_is_preferred(repository: Path, path_folder: Path) -> None:
    fake_python(path_folder / "python3", new_enough=True, makes_environments=False)
    fake_python(path_folder / "python3.11", new_enough=True)
    assert call(repository / "scripts/demo", path_folder).stdout.startswith("python3.11|")


def test_one_that_cannot_is_still_called_to_say_what_it_lacks(repository: Path, path_folder: Path) -> None:
    fake_python(path_folder / "python3", new_enough=True, makes_environments=False)
    assert call(repository / "scripts/demo", path_folder).stdout.startswith("python3|")


def test_the_current_python_need_not_make_environments(repository: Path, path_folder: Path) -> None:
    fake_python(path_folder / "python3", new_enough=True, makes_environments=False)
    fake_python(path_folder / "python3.11", new_enough=True)
    done = call(repository / "scripts/demo", path_folder, DYDIT_USE_CURRENT="1")
    assert done.stdout.startswith("python3|")


def test_a_named_python_is_taken(repository: Path, path_folder: Path) -> None:
    fake_python(path_folder / "python3", new_enough=True)
    fake_python(path_folder / "mine", new_enough=True)
    done = call(repository / "scripts/test", path_folder, DYDIT_PYTHON=str(path_folder / "mine"))
    assert done.stdout.startswith("mine|")


@pytest.mark.parametrize("named", [None, "old", "absent"])
def test_no_usable_python_is_explained_in_three_parts(
    repository: Path, path_folder: Path, named: str | None
) -> None:
    fake_python(path_folder / "old", new_enough=False)
    fake_python(path_folder / "python3", new_enough=named is not None)
    variables = {"DYDIT_PYTHON": str(path_folder / named)} if named else {}
    done = call(repository / "scripts/test", path_folder, **variables)
    assert done.returncode == 2
    assert done.stdout == ""
    what, why, fix = done.stderr.splitlines()
    assert "Python" in what
    assert why.startswith("  why: ")
    assert fix.startswith("  fix: ")


def test_scripts_are_executable_and_name_their_shell(repository: Path) -> None:
    for name, first in (
        ("scripts/demo", "#!/bin/sh"),
        ("scripts/test", "#!/bin/sh"),
        ("scripts/check.sh", "#!/bin/sh"),
        (".ci/run", "#!/usr/bin/env bash"),
    ):
        path = repository / name
        assert path.read_text().splitlines()[0] == first
        assert path.stat().st_mode & stat.S_IXUSR, f"{name} is not executable"


@pytest.mark.parametrize("name", ["environment.py", "demo.py", "test.py"])
def test_the_setup_scripts_parse_on_an_old_python(repository: Path, name: str) -> None:
    # Else a Python that is too old shows a SyntaxError where it should name the version that is needed.
    tree = ast.parse((repository / "scripts" / name).read_text(encoding="utf-8"), feature_version=(3, 7))
    local = {"environment"}
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            top = module.split(".")[0]
            assert top in sys.stdlib_module_names | local | {"packaging"}, f"{name} imports {top}"
