"""Nothing half-written: folders and files appear whole or not at all, and what the disk refuses is explained."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dydit_cli.artifacts import artifact_folder, atomic_write, write_json, writing
from dydit_cli.errors import DyditError


def fill(folder: Path, name: str = "weights") -> None:
    (folder / name).write_text("new")
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("x")


def tree(folder: Path) -> list[str]:
    return sorted(str(entry.relative_to(folder)) for entry in folder.rglob("*"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An artifact of an earlier run."""
    out = tmp_path / "runs" / "c"
    out.mkdir(parents=True)
    (out / "precious").write_text("old")
    return out


class TestFolder:
    def test_appears_whole(self, tmp_path: Path) -> None:
        out = tmp_path / "deep" / "down" / "c"
        with artifact_folder(out) as folder:
            assert folder != out
            assert folder.parent == out.parent
            fill(folder)
            assert not out.exists()
        assert tree(tmp_path / "deep" / "down") == ["c", "c/sub", "c/sub/file", "c/weights"]

    @pytest.mark.parametrize(
        "error", [RuntimeError("x"), DyditError("a", why="b", fix="c"), KeyboardInterrupt(), SystemExit(1)]
    )
    def test_vanishes_on_any_exception(self, tmp_path: Path, error: BaseException) -> None:
        with pytest.raises(type(error)) as raised, artifact_folder(tmp_path / "c") as folder:
            fill(folder)
            raise error
        assert raised.value is error
        assert tree(tmp_path) == []

    def test_a_generator_that_is_closed_leaves_nothing(self, tmp_path: Path) -> None:
        manager = artifact_folder(tmp_path / "c")
        fill(manager.__enter__())
        del manager
        assert tree(tmp_path) == []

    def test_existing_is_refused_before_anything_is_made(self, old: Path) -> None:
        with pytest.raises(DyditError, match="exists already") as error, artifact_folder(old):
            pytest.fail("the block must not run")
        assert "--overwrite" in error.value.fix
        assert tree(old.parent) == ["c", "c/precious"]

    def test_an_existing_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "c").write_text("old")
        with pytest.raises(DyditError, match="exists already"), artifact_folder(tmp_path / "c"):
            pass
        assert (tmp_path / "c").read_text() == "old"

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_an_empty_folder_is_free(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "c").mkdir()
        with artifact_folder(tmp_path / "c", overwrite=overwrite) as folder:
            fill(folder)
        assert tree(tmp_path) == ["c", "c/sub", "c/sub/file", "c/weights"]

    def test_overwrite_replaces_the_whole(self, old: Path) -> None:
        with artifact_folder(old, overwrite=True) as folder:
            assert (old / "precious").read_text() == "old"
            fill(folder)
        assert tree(old.parent) == ["c", "c/sub", "c/sub/file", "c/weights"]

    def test_overwrite_replaces_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "c").write_text("old")
        with artifact_folder(tmp_path / "c", overwrite=True) as folder:
            fill(folder)
        assert tree(tmp_path) == ["c", "c/sub", "c/sub/file", "c/weights"]

    def test_a_failure_leaves_the_old_one(self, old: Path) -> None:
        with pytest.raises(RuntimeError), artifact_folder(old, overwrite=True) as folder:
            fill(folder)
            raise RuntimeError
        assert tree(old.parent) == ["c", "c/precious"]

    @pytest.mark.parametrize("call", [1, 2])
    def test_a_failure_of_the_exchange_leaves_the_old_one(
        self, old: Path, monkeypatch: pytest.MonkeyPatch, call: int
    ) -> None:
        """Whichever of the two renames fails: the error says that what was there is untouched."""
        rename, calls = Path.rename, []

        def failing(self: Path, target: Path) -> Path:
            calls.append(target)
            if len(calls) == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(DyditError, match="disk is full"), artifact_folder(old, overwrite=True) as folder:
            fill(folder)
        assert tree(old.parent) == ["c", "c/precious"]
        assert (old / "precious").read_text() == "old"

    def test_a_folder_that_appeared_meanwhile_is_not_replaced(self, tmp_path: Path) -> None:
        """Two runs with one --out: the second to finish must not lose the first one's result."""
        with pytest.raises(DyditError, match="exists already"), artifact_folder(tmp_path / "c") as folder:
            fill(folder)
            with artifact_folder(tmp_path / "c") as other:
                fill(other, "first")
        assert tree(tmp_path) == ["c", "c/first", "c/sub", "c/sub/file"]

    def test_overwriting_a_link_spares_what_it_points_to(self, old: Path) -> None:
        link = old.with_name("link")
        link.symlink_to(old)
        with artifact_folder(link, overwrite=True) as folder:
            fill(folder)
        assert not link.is_symlink()
        assert tree(link) == ["sub", "sub/file", "weights"]
        assert tree(old) == ["precious"]

    @pytest.mark.parametrize("name", [".", "..", "../inside", "nothing/.."])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_the_working_folder_itself_is_safe(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, overwrite: bool
    ) -> None:
        """Whether it can become an artifact or not: nothing is lost, and nothing half-written stays."""
        inside = tmp_path / "around" / "inside"
        inside.mkdir(parents=True)
        (inside / "precious").write_text("old")
        monkeypatch.chdir(inside)
        try:
            with artifact_folder(name, overwrite=overwrite) as folder:
                fill(folder)
        except DyditError:
            assert tree(tmp_path) == ["around", "around/inside", "around/inside/precious"]
        else:
            assert overwrite

    def test_permissions_are_the_usual_ones(self, tmp_path: Path) -> None:
        """Temporary folders and safetensors' files are private; an artifact is not."""
        before = os.umask(0o022)
        try:
            with artifact_folder(tmp_path / "c") as folder:
                fill(folder)
                (folder / "weights").chmod(0o600)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o755
        assert stat.S_IMODE((tmp_path / "c" / "weights").stat().st_mode) == 0o644

    def test_a_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with (
            pytest.raises(DyditError, match="could not be written"),
            artifact_folder(tmp_path / "file" / "c"),
        ):
            pass

    def test_text_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with artifact_folder("c") as folder:
            fill(folder)
        assert (tmp_path / "c" / "weights").exists()


def refusing(code: int) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return refuse


class TestTheDiskRefuses:
    @pytest.mark.parametrize(
        ("code", "words"),
        [
            (errno.ENOSPC, "the disk is full"),
            (errno.EDQUOT, "quota"),
            (errno.EFBIG, "file-size limit"),
            (errno.EACCES, "could not"),
            (errno.EROFS, "could not"),
        ],
    )
    @pytest.mark.parametrize(
        "target", ["pathlib.Path.write_text", "os.replace", "pathlib.Path.mkdir", "tempfile.mkdtemp"]
    )
    def test_at_any_step(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str, target: str
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(target, refusing(code))
            with (
                pytest.raises(DyditError, match=words) as error,
                artifact_folder(tmp_path / "new" / "c") as folder,
            ):
                write_json(folder / "a.json", {})
        assert os.strerror(code) in error.value.why
        assert error.value.fix
        assert tree(tmp_path) in ([], ["new"])

    @pytest.mark.parametrize(
        "text",
        [
            "Error while serializing: I/O error: No space left on device (os error 28)",
            "I/O error: File too large (os error 27)",
            "[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/3: file write failed",
            "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598",
            "basic_ios::clear: iostream error",
        ],
    )
    def test_as_libraries_word_it(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(DyditError, match="could not be written"), artifact_folder(tmp_path / "c"):
            raise RuntimeError(text)
        assert tree(tmp_path) == []

    def test_other_errors_pass_unchanged(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), writing(tmp_path):
            raise ZeroDivisionError
        with pytest.raises(RuntimeError, match="shape"), writing(tmp_path):
            raise RuntimeError("shape 28 is invalid")

    def test_an_unreadable_input_is_not_blamed_on_the_output(self, tmp_path: Path) -> None:
        """A block that reads while it writes: the message names the file that failed."""
        with pytest.raises(DyditError) as error, artifact_folder(tmp_path / "c"):
            (tmp_path / "data.npz").read_bytes()
        assert "data.npz" in str(error.value)


class TestFile:
    def test_appears_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "a.txt"
        with atomic_write(path) as temporary:
            temporary.write_text("x")
            assert not path.exists()
        assert tree(tmp_path) == ["new", "new/a.txt"]

    @pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()])
    def test_a_failure_leaves_the_old_one(self, tmp_path: Path, error: BaseException) -> None:
        path = tmp_path / "a.txt"
        path.write_text("old")
        with pytest.raises(type(error)), atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error
        assert tree(tmp_path) == ["a.txt"]
        assert path.read_text() == "old"

    def test_a_full_disk_leaves_the_old_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.json"
        write_json(path, {"a": 1})
        monkeypatch.setattr(os, "replace", refusing(errno.ENOSPC))
        with pytest.raises(DyditError, match=r"a\.json could not be written: the disk is full"):
            write_json(path, {"a": 2})
        assert tree(tmp_path) == ["a.json"]
        assert json.loads(path.read_text()) == {"a": 1}

    def test_json(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", {"path": Path("x/y"), "list": [1, 2.5, None]})
        assert json.loads((tmp_path / "a.json").read_text()) == {"path": "x/y", "list": [1, 2.5, None]}
        assert (tmp_path / "a.json").read_text().endswith("}\n")
