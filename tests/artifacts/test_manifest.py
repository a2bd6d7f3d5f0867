"""Manifests: what made an artifact, in a form that later stages can trust."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import torch

from dydit_cli.artifacts import manifest, read_manifest, save_model, write_manifest
from dydit_cli.errors import DyditError
from tests.tiny import tiny_model


def test_round_trip(tmp_path: Path) -> None:
    written = write_manifest(
        tmp_path, stage="sample", settings={"seed": 3, "out": Path("x")}, results={"images": 8}
    )
    read = read_manifest(tmp_path)
    assert read["schema"] == manifest.SCHEMA
    assert read["stage"] == "sample"
    assert read["seed"] == 3
    assert read["settings"] == {"seed": 3, "out": "x"}
    assert read["results"] == {"images": 8}
    assert read["parent"] is None
    assert read["weights_sha256"] is None
    assert read["device"].startswith("cpu")
    assert read["threads"] == torch.get_num_threads()
    assert {"python", "torch", "diffusers", "safetensors"} <= set(read["versions"])
    assert written["versions"] == read["versions"]


def test_weights_and_parents_are_hashed(tmp_path: Path) -> None:
    parent, child, checkpoint = tmp_path / "parent", tmp_path / "child", tmp_path / "a.pt"
    save_model(tiny_model(), parent, "100KB")
    first = write_manifest(parent, stage="convert", settings={})
    digest = hashlib.sha256()
    shards = sorted(parent.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        digest.update(shard.read_bytes())
    assert first["weights_sha256"] == digest.hexdigest()
    child.mkdir()
    second = write_manifest(child, stage="finetune", settings={}, parent=parent)
    assert second["parent"] == {
        "path": str(parent),
        "stage": "convert",
        "weights_sha256": first["weights_sha256"],
    }
    checkpoint.write_bytes(b"weights")
    third = write_manifest(child, stage="convert", settings={}, parent=checkpoint)
    assert third["parent"]["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert write_manifest(child, stage="convert", settings={}, parent="builtin:x")["parent"] == {
        "path": "builtin:x"
    }


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DyditError, match="is not an artifact"):
        read_manifest(tmp_path)
    with pytest.raises(DyditError, match="is not an artifact"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"nonsense"])
def test_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / manifest.NAME).write_bytes(content)
    with pytest.raises(DyditError, match="damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("schema", [manifest.SCHEMA + 1, 99])
def test_newer(tmp_path: Path, schema: int) -> None:
    (tmp_path / manifest.NAME).write_text(json.dumps({"schema": schema}))
    with pytest.raises(DyditError, match="newer dydit") as error:
        read_manifest(tmp_path)
    assert str(schema) in error.value.why
    assert "Upgrade" in error.value.fix


@pytest.mark.parametrize("content", [[], 3, None, {}, {"schema": "1"}, {"schema": None}, {"schema": [1]}])
def test_not_a_manifest(tmp_path: Path, content: object) -> None:
    """Another program's manifest.json."""
    (tmp_path / manifest.NAME).write_text(json.dumps(content))
    with pytest.raises(DyditError):
        read_manifest(tmp_path)


class TestCommit:
    @staticmethod
    def git(folder: Path, *arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(folder), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    @pytest.fixture
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The package's file as if it lay in a repository of the test's."""
        file = tmp_path / "package" / "manifest.py"
        file.parent.mkdir()
        file.write_text("")
        self.git(tmp_path, "init", "-q")
        monkeypatch.setattr(manifest, "__file__", str(file))
        return file

    def test_of_the_checkout(self, tmp_path: Path, module: Path) -> None:
        self.git(tmp_path, "add", ".")
        self.git(tmp_path, "commit", "-qm", "x")
        assert manifest.source_commit() == self.git(tmp_path, "rev-parse", "HEAD")

    def test_of_a_checkout_without_commits(self, tmp_path: Path, module: Path) -> None:
        self.git(tmp_path, "add", ".")
        assert manifest.source_commit() is None

    def test_of_an_installation_inside_another_repository(self, tmp_path: Path, module: Path) -> None:
        """A virtual environment inside a project: the project's commit is not ours."""
        (tmp_path / "other").write_text("")
        self.git(tmp_path, "add", "other")
        self.git(tmp_path, "commit", "-qm", "x")
        assert manifest.source_commit() is None

    def test_outside_a_repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        monkeypatch.setattr(manifest, "__file__", str(tmp_path / "manifest.py"))
        assert manifest.source_commit() is None

    def test_without_git(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert manifest.source_commit() is None
