"""A repository of the Hub is priced and inspected from its headers: a stand-in for the Hub's client gives those of a local file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo
from safetensors.torch import save_file

from dydit_cli.checkpoints.hub import glimpse
from dydit_cli.cli.app import main
from dydit_cli.errors import DyditError
from tests.tiny import tiny_model

NAME = "somebody/tiny-dit"


def header_of(path: Path) -> SafetensorsFileMetadata:
    """What the Hub's client makes of a file's header."""
    with path.open("rb") as stream:
        content: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    metadata = content.pop("__metadata__", {})
    return SafetensorsFileMetadata(
        metadata=metadata,
        tensors={
            key: TensorInfo(
                dtype=each["dtype"], shape=each["shape"], data_offsets=tuple(each["data_offsets"])
            )
            for key, each in content.items()
        },
    )


@pytest.fixture
def repository_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Put a folder in the place of the Hub; weights cannot be downloaded from it. Returns what was downloaded."""
    there = tmp_path / "hub"

    def arrange(**files: Any) -> list[str]:
        downloaded: list[str] = []

        def snapshot(repository: str, *, allow_patterns: list[str], **options: object) -> str:
            assert repository == NAME
            downloaded.extend(allow_patterns)
            assert not any(pattern.endswith(".safetensors") for pattern in allow_patterns)
            place = tmp_path / "snapshot"
            for pattern in allow_patterns:
                (place / pattern).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(there / pattern, place / pattern)
            return str(place)

        for name, content in files.items():
            path = there / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.write_text(content)
            else:
                save_file(content, path)
        names = [path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()]
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *args, **options: names)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        monkeypatch.setattr(
            huggingface_hub.HfApi,
            "parse_safetensors_file_metadata",
            lambda self, repository, file, **options: header_of(there / file),
        )
        return downloaded

    return arrange


@pytest.fixture
def static() -> dict[str, Any]:
    """Tensors of a static model whose width is a published one's."""
    state = tiny_model("dit").state_dict()
    return {
        key: value.contiguous()
        for key, value in state.items()
        if "_router." not in key and not key.endswith("_order")
    }


def test_a_single_file_has_its_shapes_and_no_numbers(
    repository_of: Callable[..., list[str]], static: dict[str, Any]
) -> None:
    repository_of(tiny_DOT_safetensors=static)
    with glimpse(NAME) as path:
        assert path.name == "tiny.safetensors"
        assert path.stat().st_size == Path("hub/tiny.safetensors").stat().st_size
        assert path.stat().st_blocks * 512 < path.stat().st_size / 2, "a hole takes no room"
    assert not path.exists()


def test_plan_and_inspect(
    repository_of: Callable[..., list[str]], static: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    downloaded = repository_of(tiny_DOT_safetensors=static, README_DOT_md="---\nlicense: mit\n---\n")
    heads = ["--num-heads", "6"]
    assert main(["plan", NAME, "--family", "dit", *heads, "--json"]) == 0
    out, err = capsys.readouterr()
    of_the_hub = json.loads(out)
    assert of_the_hub["path"] == NAME
    assert "reading the headers of 1 files of somebody/tiny-dit" in err
    assert downloaded == ["README.md"]
    assert main(["plan", "hub/tiny.safetensors", "--family", "dit", *heads, "--json"]) == 0
    of_the_file = json.loads(capsys.readouterr().out)
    assert of_the_hub | {"path": ""} == of_the_file | {"path": ""}

    assert main(["plan", NAME, "--family", "dit", *heads]) == 0
    assert f"next: dydit convert --checkpoint {NAME} --family dit" in capsys.readouterr().err

    assert main(["inspect", NAME, *heads, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["path"] == NAME
    assert found["stored"]["nbytes"] == Path("hub/tiny.safetensors").stat().st_size
    assert f"--checkpoint {NAME}" in err
    assert "dydit-" not in out + err, "the stand-in's own place is nobody's business"


def test_pickled_weights_are_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "DiT-S.pt").write_bytes(b"x")
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *args, **options: ["DiT-S.pt"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(tmp_path))
    with glimpse("a/b") as path:
        assert path == tmp_path / "DiT-S.pt"


def test_without_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("plan", "inspect"):
        assert main([command, "nobody/nothing"]) == 2
        assert "the Hub cannot be asked" in capsys.readouterr().err
    with pytest.raises(DyditError, match="not the name of a repository"), glimpse("hf:nobody"):
        pass


def test_a_slip_in_a_recipe_is_not_asked_of_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "dit-xl-2-256/ful"]) == 2
    assert "did you mean 'dit-xl-2-256/full'?" in capsys.readouterr().err
