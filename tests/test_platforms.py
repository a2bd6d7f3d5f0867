"""What other systems do otherwise, as far as it can be tried on this one: renames that are refused, handles that only write, pipes
that are not UTF-8, paths with spaces and letters of other scripts, spawned processes, devices without double precision."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dydit_cli.artifacts.writing import artifact_folder, atomic_write, flush, patiently
from dydit_cli.cli import app as application
from dydit_cli.cli.app import _reader_left, main
from dydit_cli.data import TrainingBatches, open_data
from dydit_cli.data.batches import _Steps
from dydit_cli.data.mirror import MirrorRule
from dydit_cli.data.spec import parse_spec
from dydit_cli.errors import DyditError
from dydit_cli.processes import world
from dydit_cli.sampling import flow
from dydit_cli.shell import quoted
from tests.tiny import tiny_model

# The room has a function of the same name.
writing = sys.modules["dydit_cli.artifacts.writing"]
PACKAGE = Path(str(writing.__file__)).parents[1]
LINUX_ONLY = {
    # Asked for by name, or read where the file is there: each has its answer for systems without.
    "artifacts/leftovers.py",
    "diagnosis/machine.py",
    "processes/launching.py",
    "training/pace.py",
}


class Refusing:
    """A rename that Windows refuses a few times, because a file is open."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self) -> None:
        if self.left:
            self.left -= 1
            raise PermissionError(errno.EACCES, "The process cannot access the file")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing.time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("quick")
def test_a_refused_rename_is_tried_again_on_windows() -> None:
    rename = Refusing(3)
    patiently(rename, system="nt")
    assert rename.left == 0
    with pytest.raises(PermissionError):
        patiently(Refusing(99), system="nt")
    with pytest.raises(PermissionError):
        patiently(Refusing(1), system="posix")


@pytest.mark.usefixtures("quick")
def test_files_and_folders_are_renamed_patiently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(rename: Any, system: str = "") -> None:
        seen.append(1)
        rename()

    monkeypatch.setattr(writing, "patiently", watched)
    with atomic_write(tmp_path / "a.json") as file:
        file.write_text("{}")
    for _ in range(2):
        with artifact_folder(tmp_path / "b", overwrite=True) as folder:
            (folder / "c").touch()
    assert len(seen) == 1 + 1 + 2


def test_flushing_opens_files_as_windows_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")
    opened: list[int] = []
    real = os.open
    monkeypatch.setattr(writing.os, "open", lambda path, flags: opened.append(flags) or real(path, flags))
    flush(tmp_path, "posix")
    assert opened == [os.O_RDONLY, os.O_RDONLY], "the file and the folder"
    opened.clear()
    flush(tmp_path, "nt")
    assert opened == [os.O_RDWR], "a file alone, through a handle that may write"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_pipes_that_are_not_utf8(encoding: str, repository: Path, tmp_path: Path) -> None:
    """What such a pipe has no sign for is escaped; JSON stays JSON with the same content."""
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(repository)}

    def run(*words: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "dydit_cli", *words]
        return subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path, timeout=120)

    assert run("recipes", "list").returncode == 0
    done = run("recipes", "copy", "demo/fashion-mnist-dit", "λ-рецепт.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode(encoding))["copied_to"] == "λ-рецепт.yaml"


def test_a_reader_that_leaves_on_windows() -> None:
    gone = OSError(errno.EINVAL, "Invalid argument")
    assert _reader_left(BrokenPipeError(), "nt")
    assert _reader_left(gone, "nt")
    assert not _reader_left(gone, "posix")
    assert not _reader_left(OSError(errno.EINVAL, "Invalid argument", "a:b.png"), "nt"), (
        "a file's own trouble"
    )


def test_signals_that_a_system_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGXFSZ", raising=False)
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    ("word", "posix", "windows"),
    [
        ("runs/t", "runs/t", "runs/t"),
        ("my runs/t", "'my runs/t'", '"my runs/t"'),
        (r"C:\My Models\a.pt", r"'C:\My Models\a.pt'", r'"C:\My Models\a.pt"'),
        (r"C:\models\a.pt", r"'C:\models\a.pt'", r"C:\models\a.pt"),
        ("it's", "'it'\"'\"'s'", '"it\'s"'),
        ("a {class}", "'a {class}'", '"a {class}"'),
        ("", "''", '""'),
    ],
)
def test_words_of_a_shell(word: str, posix: str, windows: str) -> None:
    assert quoted(word, "posix") == posix
    assert quoted(word, "nt") == windows


def test_colons_of_drives() -> None:
    assert parse_spec(r"C:\clips").name == r"C:\clips"
    assert parse_spec(r"C:\clips=1\x").name == r"C:\clips=1\x"
    assert parse_spec(r"C:\clips:frame_interval=3") == parse_spec(r"C:\clips:frame_interval=3")
    assert parse_spec(r"C:\clips:frame_interval=3").frame_interval == 3


def test_the_adaptive_solver_needs_no_fp64_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device of the kind that has none, the model still gets fp32, and the end is the same to the last bit."""

    class Field:
        dynamic = False

        def __init__(self) -> None:
            self.seen: set[torch.dtype] = set()

        def __call__(self, state: Tensor, time: Tensor) -> Tensor:
            self.seen |= {state.dtype, time.dtype}
            return -state * (1 + time)

    def no_noise(step: int) -> Tensor:
        raise AssertionError(step)

    start = torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2)
    usual, without = Field(), Field()
    expected = list(flow.dopri5(usual, start, 4, no_noise))[-1]
    monkeypatch.setattr(flow, "WITHOUT_FP64", ("cpu",))
    assert torch.equal(list(flow.dopri5(without, start, 4, no_noise))[-1], expected)
    assert without.seen == usual.seen == {torch.float32}


def test_no_module_relies_on_what_linux_alone_has() -> None:
    """Modules that other systems lack are imported nowhere, and files of the kernel are read where their absence is foreseen."""
    absent = re.compile(r"^\s*(import|from) (resource|fcntl|pwd|grp|termios|pty)\b", re.MULTILINE)
    kernel = re.compile(r"/proc/|/dev/shm|/sys/|sched_getaffinity|os\.fork|get_context\(.fork")
    for file in PACKAGE.rglob("*.py"):
        text, name = file.read_text(encoding="utf-8"), file.relative_to(PACKAGE).as_posix()
        assert not absent.search(text), name
        if name not in LINUX_ONLY:
            assert not kernel.search(text), name


@pytest.mark.parametrize(
    ("data", "family"), [("fashion-mnist-subset", "dit"), ("moving-fashion-mnist", "latte")]
)
def test_what_reads_samples_travels_to_a_spawned_process(data: str, family: str) -> None:
    """macOS and Windows start processes anew, and send them what they work on."""
    model = tiny_model(family, in_channels=1, sample_size=32, patch_size=8)
    batches = TrainingBatches(open_data(data, geometry=model.geometry).train, 2, 0, MirrorRule(False))
    travelled = pickle.loads(pickle.dumps(_Steps(batches)))
    assert torch.equal(batches.at(1).clean, travelled[1].clean)


def test_files_are_opened_with_an_encoding() -> None:
    """Windows takes its code page for one that is not named."""
    unnamed = re.compile(r"\.(read_text|write_text)\((?![^()]*encoding)[^()]*\)")
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        # Arguments with brackets of their own are cut out first.
        flat = re.sub(
            r"\((?:[^()]|\([^()]*\))*\)",
            lambda found: "(" + found[0][1:-1].replace("(", "[").replace(")", "]") + ")",
            text,
        )
        assert not unnamed.search(flat), (file.name, unnamed.search(flat))


def test_a_path_with_spaces_and_other_letters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through conversion, inspection and export; what is proposed can be pasted."""
    out = tmp_path / "Мои модели" / "größe 1"
    assert main(["convert", "--checkpoint", "builtin:dit_fmnist", "--out", str(out)]) == 0
    err = capsys.readouterr().err
    assert f"--model '{out}'" in err
    assert main(["inspect", str(out)]) == 0
    assert f"--model '{out}'" in capsys.readouterr().err
    assert main(["export", "--model", str(out), "--format", "static", "--out", str(out.parent / "e e")]) == 0
    assert (out.parent / "e e" / "model.pt").is_file()


def test_an_export_over_its_source_by_another_spelling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `Runs` and `runs` are one folder on some systems, a link and its target are here."""
    out = tmp_path / "c"
    assert main(["convert", "--checkpoint", "builtin:dit_fmnist", "--out", str(out)]) == 0
    (tmp_path / "C").symlink_to(out, target_is_directory=True)
    capsys.readouterr()
    words = ["export", "--model", str(out), "--format", "static", "--out", str(tmp_path / "C"), "--overwrite"]
    assert main(words) == 2
    assert "the model that is to be exported" in capsys.readouterr().err


def test_apples_gpu_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "find_device", lambda name: torch.device("mps"))
    assert world.World().device("auto") == torch.device("mps")
    with pytest.raises(DyditError, match="cannot be shared by 2 processes"):
        world.World(rank=0, size=2).device("auto")


def test_environment_for_apples_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)
    monkeypatch.setattr(application, "_run", lambda words, given: 0)
    assert main(["--version"]) == 0
    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "0")
    main(["--version"])
    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "0", "what the user set stays"
