"""Uploads through a stand-in of the Hub's client: what is asked of it, in which order, and what its refusals become."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from dydit_cli.cli.app import main
from dydit_cli.errors import DyditError
from dydit_cli.export.publish import Destination, publish
from dydit_cli.shell import quoted
from tests.export.artifacts import trained

NAME = "somebody/dit-dynamic"


class Refusal(Exception):
    """What the Hub's client raises when the server says no."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} Client Error for url")
        self.response = type("Response", (), {"status_code": status})()


class Hub:
    """Remembers what it was asked; its repositories say whether they are private."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.token: str | None = "hf_token"
        self.repositories: dict[str, bool] = {}
        self.refuses: dict[str, Exception] = {}

    def answer(self, name: str, **asked: Any) -> Any:
        self.calls.append((name, asked))
        if name in self.refuses:
            raise self.refuses[name]
        return None

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The stand-in, in the place of huggingface_hub's client."""
    there = Hub()

    class Client:
        def whoami(self) -> Any:
            return there.answer("whoami")

        def repo_exists(self, repo_id: str) -> bool:
            there.answer("repo_exists", repo_id=repo_id)
            return repo_id in there.repositories

        def repo_info(self, repo_id: str) -> Any:
            there.answer("repo_info", repo_id=repo_id)
            return SimpleNamespace(private=there.repositories[repo_id])

        def create_repo(self, repo_id: str, **options: Any) -> str:
            there.answer("create_repo", repo_id=repo_id, **options)
            there.repositories.setdefault(repo_id, options["private"])
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, **options: Any) -> None:
            folder = Path(options["folder_path"])
            assert (folder / "model_index.json").is_file(), "the export is finished first"
            there.answer("upload_folder", **options, card=(folder / "README.md").read_text())

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: there.token)
    return there


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    model = trained(tmp_path / "t", in_channels=1)
    return ["export", "--model", str(model), "--out", "e", "--push-to-hub", NAME, "--license", "mit"]


def test_an_upload(words: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert hub.names == ["whoami", "repo_exists", "create_repo", "upload_folder"]
    assert f"Uploaded to https://huggingface.co/{NAME}" in out
    listed = err.partition(f"go to {NAME}, seen by everybody:")[2]
    assert "transformer/diffusion_pytorch_model.safetensors" in listed
    assert listed.index("README.md") < listed.index("uploading to")
    created, uploaded = hub.calls[2][1], hub.calls[3][1]
    assert created == {"repo_id": NAME, "repo_type": "model", "private": False, "exist_ok": False}
    assert uploaded["ignore_patterns"] == ["recipe.yaml", "manifest.json"], "local paths stay here"
    assert uploaded["delete_patterns"] is None
    assert "are deleted" not in err
    assert f"hf download {NAME} --local-dir e" in uploaded["card"]
    assert str(Path.cwd()) not in uploaded["card"]


def test_json_has_the_address(words: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--private", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["url"] == f"https://huggingface.co/{NAME}"
    assert report["license"] == "mit"
    assert hub.calls[2][1]["private"] is True


def test_an_unknown_licence_is_warned_of(
    words: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words[:-2]) == 0
    assert "the licence is unknown" in capsys.readouterr().err


def test_without_a_login_nothing_is_exported(
    words: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.token = None
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "Nobody is logged in" in err
    assert "hf auth login" in err
    assert not Path("e").exists()
    assert hub.calls == []


def test_what_exists_is_not_replaced(words: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories[NAME] = False
    assert main(words) == 2
    assert f"The repository {NAME} exists already." in capsys.readouterr().err
    assert not Path("e").exists()
    assert main([*words, "--overwrite"]) == 0
    assert hub.calls[-2][1]["exist_ok"] is True
    # Shards and the index of an older export would be loaded in the place of the new file.
    assert hub.calls[-1][1]["delete_patterns"] == "*"
    assert "other files that are there now are deleted" in capsys.readouterr().err


def test_a_public_repository_is_not_taken_for_a_private_one(
    words: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[NAME] = False
    assert main([*words, "--private", "--overwrite"]) == 2
    assert "exists, and everybody sees it" in capsys.readouterr().err
    assert not Path("e").exists(), "that is said before the export"
    assert hub.names == ["whoami", "repo_exists", "repo_info"]


def test_a_private_repository_is_said_to_be_one(
    words: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[NAME] = True
    assert main([*words, "--overwrite"]) == 0
    assert f"go to {NAME}, seen by its owner alone:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "destination", "command"),
    [
        (
            "2.4.0",
            Destination(NAME, exists=False, private=True),
            "hf upload {} e --exclude recipe.yaml --exclude manifest.json --private",
        ),
        (
            "0.36.0",
            Destination(NAME, exists=True, private=False),
            f"hf upload {{}} e --exclude recipe.yaml manifest.json --delete {quoted('*')}",
        ),
    ],
)
def test_by_hand_the_same_files_go_to_the_same_place(
    version: str, destination: Destination, command: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "__version__", version)
    Path("e").mkdir()
    for name in ("README.md", "model_index.json"):
        Path("e", name).write_text("")
    hub.refuses["upload_folder"] = TimeoutError("timed out")
    with pytest.raises(DyditError) as caught:
        publish(Path("e"), destination, lambda what: None)
    assert f"`{command.format(NAME)}`" in caught.value.fix
    assert "dydit export" not in caught.value.fix, "what was exported is whole"


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ("whoami", Refusal(401), "does not accept this machine's login"),
        ("whoami", ConnectionError("no route to host"), "The Hub cannot be reached."),
        ("create_repo", Refusal(403), "does not let you write to"),
        ("create_repo", Refusal(409), "exists already"),
        ("upload_folder", Refusal(500), "refused to take"),
        ("upload_folder", TimeoutError("timed out"), "The Hub cannot be reached."),
    ],
)
def test_refusals(
    call: str, error: Exception, said: str, words: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuses[call] = error
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "  fix: " in err
    assert "Traceback" not in err
    # What was exported by then is kept, and how to upload it later is told.
    assert Path("e").exists() is (call != "whoami")
    assert ("hf upload" in err) is (call != "whoami")


@pytest.mark.parametrize(
    "name", ["dit", "a/b/c", "a/b@main", "hf:a/b", "a b/c", "https://huggingface.co/a/b"]
)
def test_names_that_cannot_be(
    name: str, words: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    words[words.index(NAME)] = name
    assert main(words) == 2
    assert "is not the name of a repository" in capsys.readouterr().err
    assert hub.calls == []


def test_a_dry_run_asks_nobody(words: list[str], hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--dry-run"]) == 0
    assert f"to {NAME}" in capsys.readouterr().out
    assert hub.calls == []
    assert not Path("e").exists()


def test_private_alone_means_nothing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    place = words.index("--push-to-hub")
    assert main([*words[:place], *words[place + 2 :], "--private"]) == 2
    assert "nothing is uploaded" in capsys.readouterr().err
