"""`dydit recipes`: list, show, copy, validate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dydit_cli.cli.app import main
from dydit_cli.recipe.builtin import builtin_recipes, find_recipe
from dydit_cli.recipe.loading import load_recipe

NAME = "dit-xl-2-256/full"


def test_list_names_describes_and_says_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    out = capsys.readouterr().out
    for recipe in builtin_recipes():
        line = next(line for line in out.splitlines() if line.startswith(recipe.name))
        stages = " ".join(load_recipe(recipe.name).sections)
        assert stages.startswith(("convert", "prepare convert")), recipe.name
        assert line.rstrip().endswith(f" {stages}")


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list", "--json"]) == 0
    captured = capsys.readouterr()
    entries = {entry["name"]: entry for entry in json.loads(captured.out)}
    assert list(entries) == [recipe.name for recipe in builtin_recipes()]
    assert entries[NAME]["stages"] == ["convert", "finetune", "profile", "sample", "evaluate", "export"]
    assert Path(entries[NAME]["path"]).is_file()
    assert captured.err == ""


def test_show_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", NAME]) == 0
    assert capsys.readouterr().out == find_recipe(NAME).read_text(encoding="utf-8")


def test_show_resolved_prints_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", NAME, "--resolved"]) == 0
    out = capsys.readouterr().out
    assert "max_shard_size: 5GB" in out
    assert "model: runs/dit-xl-2-256/finetuned" in out
    Path("again.yaml").write_text(out, encoding="utf-8")
    assert main(["recipes", "validate", "again.yaml"]) == 0


def test_copy_into_the_working_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "copy", NAME]) == 0
    assert Path("dit-xl-2-256-full.yaml").read_bytes() == find_recipe(NAME).read_bytes()
    assert "copied to dit-xl-2-256-full.yaml" in capsys.readouterr().out


def test_copy_into_a_folder_and_to_a_name() -> None:
    Path("mine").mkdir()
    assert main(["recipes", "copy", NAME, "mine"]) == 0
    assert main(["recipes", "copy", NAME, "mine/x.yaml"]) == 0
    assert sorted(path.name for path in Path("mine").iterdir()) == ["dit-xl-2-256-full.yaml", "x.yaml"]


def test_copy_overwrites_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.yaml").write_text("mine")
    assert main(["recipes", "copy", NAME, "x.yaml"]) == 2
    assert Path("x.yaml").read_text() == "mine"
    assert "x.yaml exists already." in capsys.readouterr().err


def test_copy_to_where_nothing_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "copy", NAME, "no/such/x.yaml"]) == 2
    assert "A file or folder is missing: no/such/x.yaml" in capsys.readouterr().err


def test_a_copy_that_fails_leaves_nothing(repository: Path) -> None:
    """A file-size limit stops the copy in the middle."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); from dydit_cli.cli.app import main; "
    done = subprocess.run(
        [sys.executable, "-c", limited + f"sys.exit(main(['recipes', 'copy', '{NAME}', 'x.yaml']))"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "A file would grow beyond the allowed size" in done.stderr
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("command", ["show", "copy"])
def test_an_unknown_name_is_answered_with_the_nearest(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", command, "dit-xl-2-265/full"]) == 2
    assert f"did you mean '{NAME}'?" in capsys.readouterr().err


def test_validate_says_ok_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    names = [recipe.name for recipe in builtin_recipes()]
    assert main(["recipes", "validate", *names]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == names


def test_validate_reports_the_mistakes_of_all_files(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text("schema: 1\nexport:\n  model: t\n  out: e\n  fromat: static\n")
    Path("b.yaml").write_text("schema: 1\nexport:\n  model: t\n  out: e\n  format: statik\n")
    assert main(["recipes", "validate", "a.yaml", NAME, "b.yaml", "c.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == f"{NAME}: ok (convert, finetune, profile, sample, evaluate, export)\n"
    said = captured.err.partition("\n  why:")[0].splitlines()
    assert said[0] == "a.yaml:5: export.fromat: unknown key, did you mean 'format'?"
    assert said[1].endswith("got 'statik', did you mean 'static'?")
    assert said[2] == "There is no recipe 'c.yaml'."
