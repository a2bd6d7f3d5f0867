"""scripts/environment.py: when it installs, what it leaves alone, and what it says when something is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

CONSTRAINTS = "# tested together\nnumpy==2.0.0\ntorch==2.13.0\ntyper==0.29.0\n"


class Installer:
    """Stands in for pip: remembers what it was asked for, and fails when told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[str, ...], str]] = []
        self.error: BaseException | None = None

    def __call__(self, python: Path, extras: tuple[str, ...], kept_torch: str, root: Path) -> None:
        self.calls.append((tuple(extras), kept_torch))
        if self.error is not None:
            raise self.error


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "a project"
    root.mkdir()
    (root / "pyproject.toml").write_text('[project]\nname = "p"\n')
    (root / "constraints.txt").write_text(CONSTRAINTS)
    return root


@pytest.fixture
def installer(environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Installer:
    installer = Installer()
    monkeypatch.setattr(environment, "_install", installer)
    monkeypatch.setattr(environment, "_require_working", lambda python: None)
    monkeypatch.setattr(environment, "_make", lambda folder, python: folder.mkdir())
    return installer


def test_a_second_call_installs_nothing(environment: ModuleType, installer: Installer, project: Path) -> None:
    first = environment.ready(root=project)
    second = environment.ready(root=project)
    assert first == second
    assert Path(first).is_relative_to(project / ".venv")
    assert installer.calls == [((), "")]


def test_the_development_tools_are_added_once_and_kept(
    environment: ModuleType, installer: Installer, project: Path
) -> None:
    environment.ready(root=project)
    environment.ready(extra="dev", root=project)
    environment.ready(extra="dev", root=project)
    environment.ready(root=project)
    assert installer.calls == [((), ""), (("dev",), "")]


def test_changed_requirements_install_again_with_the_same_extras(
    environment: ModuleType, installer: Installer, project: Path
) -> None:
    environment.ready(extra="dev", root=project)
    (project / "constraints.txt").write_text(CONSTRAINTS + "rich==15.0.0\n")
    environment.ready(root=project)
    assert installer.calls == [(("dev",), ""), (("dev",), "")]


def test_a_moved_project_is_installed_again(
    environment: ModuleType, installer: Installer, project: Path
) -> None:
    environment.ready(root=project)
    moved = project.rename(project.parent / "elsewhere")
    environment.ready(root=moved)
    assert len(installer.calls) == 2


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), RuntimeError("pip failed")])
def test_a_broken_off_installation_is_taken_up_again(
    environment: ModuleType, installer: Installer, project: Path, interruption: BaseException
) -> None:
    installer.error = interruption
    with pytest.raises(type(interruption)):
        environment.ready(root=project)
    installer.error = None
    environment.ready(root=project)
    environment.ready(root=project)
    assert len(installer.calls) == 2


def test_a_damaged_stamp_counts_as_none(environment: ModuleType, installer: Installer, project: Path) -> None:
    environment.ready(root=project)
    (project / ".venv" / "dydit-environment.json").write_text('{"fingerprint": 3}')
    environment._foreign_torch = lambda python, root: ""
    environment.ready(root=project)
    assert len(installer.calls) == 2


def test_an_environment_of_the_users_own_keeps_its_torch_for_good(
    environment: ModuleType, installer: Installer, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / ".venv").mkdir()
    monkeypatch.setattr(environment, "_foreign_torch", lambda python, root: "2.11.0+cu130")
    environment.ready(root=project)
    environment.ready(extra="dev", root=project)
    assert installer.calls == [((), "2.11.0+cu130"), (("dev",), "2.11.0+cu130")]


@pytest.mark.parametrize(
    ("printed", "code", "kept"),
    [("2.13.0+cpu\n", 0, ""), ("2.13.0\n", 0, ""), ("2.11.0+cu130\n", 0, "2.11.0+cu130"), ("", 1, "")],
)
def test_only_a_torch_other_than_the_tested_one_is_foreign(
    environment: ModuleType,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    printed: str,
    code: int,
    kept: str,
) -> None:
    answer = SimpleNamespace(returncode=code, stdout=printed)
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, **kwargs: answer)
    assert environment._foreign_torch(Path("python"), project) == kept


def watching(code: int, output: str, seen: dict[str, object]) -> Callable[..., tuple[int, str]]:
    def watch(command: list[str], variables: dict[str, str], log: Path) -> tuple[int, str]:
        seen["command"] = command
        seen["variables"] = variables
        seen["constraints"] = Path(command[command.index("-c") + 1]).read_text()
        return code, output

    return watch


def test_pip_gets_the_constraints_and_the_extras(
    environment: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setattr(environment, "_watch", watching(0, "", seen))
    environment._install(project / ".venv/bin/python", ("dev",), "", project)
    assert seen["command"][-2:] == ["-e", f"{project}[dev]"]
    assert seen["constraints"] == CONSTRAINTS
    assert seen["variables"]["PIP_USER"] == "0"


def test_pip_is_told_to_keep_a_foreign_torch(
    environment: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr(environment, "_watch", watching(0, "", seen))
    environment._install(project / ".venv/bin/python", (), "2.11.0+cu130", project)
    assert seen["constraints"] == CONSTRAINTS.replace("torch==2.13.0", "torch==2.11.0+cu130")


def test_the_output_of_pip_is_kept_and_its_exit_code_returned(
    environment: ModuleType, tmp_path: Path
) -> None:
    script = "print('Collecting numpy (from p)'); print('noise'); raise SystemExit(3)"
    code, output = environment._watch([sys.executable, "-c", script], {}, tmp_path / "log")
    assert code == 3
    assert output.splitlines() == ["Collecting numpy (from p)", "noise"]
    assert (tmp_path / "log").read_text() == output


@pytest.mark.parametrize(
    ("output", "why", "fix"),
    [
        (
            "WARNING: Retrying after NewConnectionError('Failed to establish a new connection')\n"
            "ERROR: No matching distribution found for hatchling",
            "could not be reached",
            "network",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "disk",
            "free",
        ),
        (
            "ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)\n"
            "ERROR: No matching distribution found for torch==2.13.0",
            "no build for Python",
            "DYDIT_PYTHON",
        ),
        (
            "      OSError: Readme file does not exist\nerror: metadata-generation-failed",
            "Readme file",
            "install.log",
        ),
        ("", "no reason", "install.log"),
    ],
)
def test_failures_of_pip_are_explained(environment: ModuleType, output: str, why: str, fix: str) -> None:
    lines = str(environment._explained(output, Path("install.log"))).splitlines()
    assert lines[0] == "the packages could not be installed."
    assert lines[1].startswith("  why: ")
    assert why in lines[1]
    assert lines[2].startswith("  fix: ")
    assert fix in lines[2]


def test_an_old_python_is_refused(
    environment: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.sys, "version_info", (3, 10, 13, "final", 0))
    with pytest.raises(environment.SetupError, match=r"needs Python 3\.11 or newer"):
        environment.ready(root=project)
    assert not (project / ".venv").exists()


def test_a_python_without_ensurepip_names_the_package_to_install(
    environment: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    with pytest.raises(environment.SetupError, match=rf"apt install python{version}-venv"):
        environment.ready(root=project)
    assert not (project / ".venv").exists()


def test_too_little_disk_is_said_before_anything_is_written(
    environment: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_200_000_000))
    with pytest.raises(environment.SetupError, match=r"1\.2 GB are free"):
        environment.ready(root=project)
    assert not (project / ".venv").exists()


@pytest.mark.parametrize("failure", [PermissionError("read-only file system"), KeyboardInterrupt()])
def test_an_environment_that_could_not_be_made_leaves_nothing(
    environment: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    import venv

    def create(builder: object, folder: Path) -> None:
        (folder / "bin").mkdir(parents=True)
        raise failure

    monkeypatch.setattr(venv.EnvBuilder, "create", create)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else environment.SetupError
    with pytest.raises(expected):
        environment.ready(root=project)
    assert not (project / ".venv").exists()


def test_an_environment_that_does_not_run_is_named(environment: ModuleType, project: Path) -> None:
    (project / ".venv").mkdir()
    with pytest.raises(environment.SetupError, match=r"does not work[\s\S]*delete the folder"):
        environment.ready(root=project)


def test_a_named_python_other_than_the_environments_is_not_ignored(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYDIT_PYTHON", "python3.12")
    answer = SimpleNamespace(returncode=0, stdout="3.99\n", stderr="")
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, **kwargs: answer)
    with pytest.raises(environment.SetupError, match=r"made with Python 3\.99"):
        environment._require_working(Path(".venv/bin/python"))


class TestUsingTheCurrentPython:
    @pytest.fixture(autouse=True)
    def switched_on(self, environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DYDIT_USE_CURRENT", "1")

    def test_nothing_is_made(self, environment: ModuleType, project: Path) -> None:
        (project / "pyproject.toml").write_text('[project]\ndependencies = ["pytest>=1.0"]\n')
        assert environment.ready(root=project) == sys.executable
        assert not (project / ".venv").exists()

    def test_missing_and_too_old_packages_are_named_together(
        self, environment: ModuleType, project: Path
    ) -> None:
        (project / "pyproject.toml").write_text(
            '[project]\ndependencies = ["pytest>=999", "no-such-package-here"]\n'
            '[project.optional-dependencies]\ndev = ["nor-this-one"]\n'
        )
        with pytest.raises(environment.SetupError) as caught:
            environment.ready(extra="dev", root=project)
        text = str(caught.value)
        assert "pytest>=999 (found " in text
        assert "no-such-package-here" in text
        assert "nor-this-one" in text
        assert "[dev]" in text.splitlines()[2]


def test_setup_errors_leave_with_code_2_and_no_traceback(
    environment: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise environment.SetupError("it broke.", "because.", "mend it.")

    with pytest.raises(SystemExit) as caught:
        environment.leave(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "it broke.\n  why: because.\n  fix: mend it.\n"


def test_the_stamp_is_readable_json(environment: ModuleType, installer: Installer, project: Path) -> None:
    environment.ready(extra="dev", root=project)
    stamp = json.loads((project / ".venv" / "dydit-environment.json").read_text())
    assert stamp["extras"] == ["dev"]
    assert len(stamp["fingerprint"]) == 64
