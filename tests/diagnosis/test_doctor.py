"""`dydit doctor`: verdicts on what it may meet, each shown to be able to fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dydit_cli.cli.app import main
from dydit_cli.diagnosis import examine, packages
from dydit_cli.diagnosis.check import Check, Verdict, worst
from dydit_cli.diagnosis.machine import (
    check_compiler,
    check_gpu,
    check_memory,
    check_mps,
    check_openmp,
    check_threads,
)
from dydit_cli.diagnosis.packages import check_package, numbers, requirements, within
from dydit_cli.diagnosis.places import check_place, places


@pytest.mark.parametrize(
    ("built_for", "works", "nvidia", "verdict", "said"),
    [
        ("13.0", True, ["H200"], Verdict.GOOD, "torch built for 13.0"),
        (None, False, [], Verdict.GOOD, "runs on the CPU"),
        (
            None,
            False,
            ["NVIDIA H200"],
            Verdict.WARNING,
            "NVIDIA H200, which this torch cannot use: it is a CPU-only build",
        ),
        ("13.0", False, ["NVIDIA H200"], Verdict.WARNING, "does not find"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_found(
    built_for: str | None, works: bool, nvidia: list[str], verdict: Verdict, said: str
) -> None:
    check = check_gpu(built_for, works, ["H200"] if works else [], nvidia)
    assert check.verdict is verdict
    assert said in check.found
    assert bool(check.fix) == (verdict is Verdict.WARNING)


@pytest.mark.parametrize(
    ("threads", "usable", "setting", "verdict"),
    [
        (2, 2, None, Verdict.GOOD),
        (8, 2, None, Verdict.WARNING),
        (1, 2, "1", Verdict.NOTE),
        (1, 2, None, Verdict.GOOD),
    ],
)
def test_threads(threads: int, usable: int, setting: str | None, verdict: Verdict) -> None:
    environment = {} if setting is None else {"OMP_NUM_THREADS": setting}
    assert check_threads(threads, usable, environment).verdict is verdict


def test_the_rest_of_the_machine() -> None:
    assert check_openmp("ATen parallel backend: OpenMP").verdict is Verdict.GOOD
    assert check_openmp("").verdict is Verdict.NOTE
    assert check_mps(built=True, works=False).verdict is Verdict.NOTE
    assert check_memory(10**9).verdict is Verdict.WARNING
    assert check_memory(10**11).verdict is Verdict.GOOD


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert check_compiler(None).verdict is Verdict.NOTE


def test_versions_and_bounds() -> None:
    assert numbers("2.13.0+cpu") == (2, 13, 0)
    assert numbers("0.1.5.post20221221") == (0, 1, 5)
    assert within("2.13.0+cpu", ">=2.6")
    assert within("0.21.2", ">=0.21,<0.22")
    assert not within("0.22", ">=0.21,<0.22")
    assert not within("2.5.1", ">=2.6")
    assert within("5.23.0", "")


def test_the_bounds_are_those_of_the_project() -> None:
    # Installed metadata may have them in another order than pyproject.toml.
    assert set(requirements()["peft"].split(",")) == {">=0.21", "<0.22"}
    assert {"torch", "diffusers", "av"} <= set(requirements())


def test_packages_that_are_missing_old_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_package("surely-no-such-package", ">=1").verdict is Verdict.BROKEN
    assert check_package("torch", ">=99").verdict is Verdict.BROKEN
    assert check_package("safetensors", ">=0.1").verdict is Verdict.GOOD
    monkeypatch.setattr(
        packages, "import_fault", lambda module: "RuntimeError: operator torchvision::nms does not exist"
    )
    check = check_package("diffusers", ">=0.1")
    assert check.verdict is Verdict.BROKEN
    assert "uninstall torchvision" in check.fix


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_place("x", tmp_path / "not" / "yet", "X").verdict is Verdict.GOOD
    assert places({"HF_HOME": "/elsewhere"})["downloads of the Hub"][0] == Path("/elsewhere")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    check = check_place("x", tmp_path, "HF_HOME")
    assert check.verdict is Verdict.WARNING
    assert "HF_HOME" in check.fix


def test_the_gravest_verdict() -> None:
    checks = [Check("a", "b", verdict, "c") for verdict in (Verdict.NOTE, Verdict.BROKEN, Verdict.WARNING)]
    assert worst(checks) is Verdict.BROKEN
    assert worst([]) is Verdict.GOOD


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    for expected in ("torch", "threads", "GPU", "temporary files", "wandb"):
        assert expected in out
    assert "importing torch" in err


def test_what_is_broken_shows_in_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Check("needed", "torch", Verdict.BROKEN, "not installed", "install it")
    monkeypatch.setattr(examine, "examine", lambda version: iter([broken]))
    assert main(["doctor"]) == 2
    assert "torch: install it" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "broken"
    assert said["checks"][0]["fix"] == "install it"
