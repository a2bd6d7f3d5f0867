"""A checkpoint from a stranger is data: code in it is never run. Each file here would create a marker if it were."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.errors import DyditError


class Evil:
    """Unpickles by calling a function with arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def attacks(marker: Path) -> dict[str, Evil]:
    return {
        "open": Evil(open, str(marker), "w"),
        "os.system": Evil(os.system, f"touch {marker}"),
        "eval": Evil(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Evil(exec, f"open({str(marker)!r}, 'w')"),
        "subprocess": Evil(subprocess.check_call, ["touch", str(marker)]),
        "getattr": Evil(getattr, argparse.Namespace(), "x"),
        "torch.load": Evil(torch.load, str(marker)),
        "torch.save": Evil(torch.save, {}, str(marker)),
    }


NAMES = list(attacks(Path()))


def refused(path: Path, marker: Path) -> DyditError:
    with pytest.raises(DyditError) as error:
        read_checkpoint(path)
    assert not marker.exists()
    assert str(path) in error.value.what
    return error.value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "older"])
def test_a_torch_file_with_code(tmp_path: Path, name: str, new: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    content = {"ema": {"a": torch.ones(2)}, "args": attacks(marker)[name]}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    error = refused(path, marker)
    assert "more than weights" in error.what
    assert "would run code" in error.why


def test_the_code_works_when_it_is_run(tmp_path: Path) -> None:
    """Else these tests would prove nothing."""
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    torch.save({"args": attacks(marker)["os.system"]}, path)
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
def test_a_bare_pickle_with_code(tmp_path: Path, protocol: int, suffix: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / f"a{suffix}"
    path.write_bytes(pickle.dumps({"a": attacks(marker)["os.system"]}, protocol=protocol))
    refused(path, marker)


def test_code_inside_a_namespace(tmp_path: Path) -> None:
    """Namespaces are let through; what they hold is not."""
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    arguments = argparse.Namespace(model="DiT-S/2", data=attacks(marker)["os.system"])
    torch.save({"ema": {"a": torch.ones(2)}, "args": arguments}, path)
    refused(path, marker)


def test_code_in_place_of_the_weights_and_in_keys(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    for content in ({"ema": attacks(marker)["open"]}, [attacks(marker)["open"]], attacks(marker)["open"]):
        torch.save(content, path)
        refused(path, marker)


def test_a_pickle_under_the_name_of_safetensors(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.safetensors"
    torch.save({"args": attacks(marker)["os.system"]}, path)
    refused(path, marker)


def test_a_pickle_under_a_name_without_suffix(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "weights"
    torch.save({"args": attacks(marker)["os.system"]}, path)
    refused(path, marker)


def test_a_whole_model_is_refused_and_named(tmp_path: Path) -> None:
    """Saved by torch.save(model): its class would be imported, and with it whatever its module does."""
    path = tmp_path / "a.pt"
    torch.save(nn.Sequential(nn.Linear(2, 2)), path)
    assert "torch.nn.modules.container.Sequential" in refused(path, tmp_path / "marker").why


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../../escape", "x")
        file.writestr("data.pkl", b"cos\nsystem\n(S'touch escape'\ntR.")
    refused(path, tmp_path / "escape")


def test_a_namespace_is_not_left_allowed_for_others(tmp_path: Path) -> None:
    """The exception made for our read is undone: other code in the process keeps torch's own list."""
    path = tmp_path / "a.pt"
    torch.save({"ema": {"a": torch.ones(2)}, "args": argparse.Namespace(x=1)}, path)
    read_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_the_environment_cannot_switch_the_check_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    torch.save({"args": attacks(marker)["os.system"]}, path)
    refused(path, marker)
