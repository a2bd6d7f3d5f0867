"""From a name to a checkpoint: paths first, then shipped models, then repositories of the Hub, of which only the model comes."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from dydit_cli.checkpoints.hub import _wanted, download, is_repository
from dydit_cli.checkpoints.locating import located
from dydit_cli.cli.app import main
from dydit_cli.errors import DyditError

DIT_XL = [
    ".gitattributes",
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.bin",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
]


def test_what_is_a_repository(tmp_path: Path) -> None:
    assert is_repository("facebook/DiT-XL-2-256")
    assert is_repository("facebook/DiT-XL-2-256@main")
    assert is_repository("hf:a/b")
    assert not is_repository("DiT-XL-2-256.pt")
    assert not is_repository("a/b.safetensors")
    assert not is_repository("a/b/c")
    assert not is_repository(str(tmp_path / "a"))
    # A slip in a path is told as one, and asks nobody.
    Path("runs").mkdir()
    assert not is_repository("runs/convertd")


def test_paths_and_shipped_models() -> None:
    assert located("~/a.pt") == Path("~/a.pt").expanduser()
    assert located("builtin:dit_fmnist").is_file()
    with pytest.raises(DyditError, match="no shipped model"):
        located("builtin:dit")


def test_only_the_model_is_wanted() -> None:
    assert _wanted(DIT_XL, "r") == [
        "README.md",
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.bin",
    ]


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        (["m.bin", "m.safetensors"], ["m.safetensors"]),
        (["model.bin", "model.fp16.bin", "model.safetensors"], ["model.safetensors"]),
        (
            [
                "diffusion_pytorch_model-00001-of-00002.safetensors",
                "diffusion_pytorch_model-00002-of-00002.safetensors",
            ],
            [
                "diffusion_pytorch_model-00001-of-00002.safetensors",
                "diffusion_pytorch_model-00002-of-00002.safetensors",
            ],
        ),
        (["DiT-XL-2-256x256.pt"], ["DiT-XL-2-256x256.pt"]),
    ],
)
def test_weights_of_a_repository(weights: list[str], wanted: list[str]) -> None:
    assert _wanted(weights, "r") == wanted


def test_several_models_or_none() -> None:
    with pytest.raises(DyditError, match="more than one"):
        _wanted(["a.pt", "b.pt"], "r")
    with pytest.raises(DyditError, match="no weights"):
        _wanted(["README.md"], "r")


def test_a_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is asked of the Hub's client; the network is not."""
    asked = {}

    def list_files(self: object, repository: str, revision: str | None) -> list[str]:
        return DIT_XL

    def snapshot(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    said: list[str] = []
    assert download("hf:facebook/DiT-XL-2-256@v1", said.append) == tmp_path
    assert asked["repository"] == "facebook/DiT-XL-2-256"
    assert asked["revision"] == "v1"
    assert "transformer/diffusion_pytorch_model.bin" in asked["allow_patterns"]
    assert "vae/diffusion_pytorch_model.bin" not in asked["allow_patterns"]
    assert said == ["downloading 4 files of facebook/DiT-XL-2-256 from the Hub"]


def test_a_single_file_is_the_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *args, **options: ["DiT-S.pt"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(tmp_path))
    assert download("a/b") == tmp_path / "DiT-S.pt"


def test_offline_is_a_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    assert main(["convert", "--checkpoint", "nobody/nothing", "--out", "c"]) == 2
    said = capsys.readouterr().err
    assert "the Hub cannot be asked" in said
    assert "go online" in said
    assert not Path("c").exists()


def test_what_was_downloaded_before_is_found_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "transformer"
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "diffusion_pytorch_model.safetensors").write_bytes(b"")

    def snapshot(repository: str, **options: object) -> str:
        assert options["local_files_only"]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert download("a/b") == tmp_path


def test_a_repository_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class RepositoryNotFoundError(huggingface_hub.errors.HfHubHTTPError):
        def __init__(self) -> None:
            Exception.__init__(self, "401 Client Error")

    def list_files(*args: object, **options: object) -> list[str]:
        raise RepositoryNotFoundError

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_files)
    with pytest.raises(DyditError, match="does not give the repository a/b"):
        download("a/b")
