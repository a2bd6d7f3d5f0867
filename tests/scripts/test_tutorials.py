"""Tutorials are run, not typed: what commands print takes the place of what a page has, and the rest stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.tutorials import FOLDER, commands_of, run_page, with_outputs

BLOCK = """$ dydit convert --out a \\
    --family dit
old output

$ dydit profile
"""


def test_commands_may_go_on_in_the_next_line() -> None:
    assert [command.split() for command in commands_of(BLOCK)] == [
        ["dydit", "convert", "--out", "a", "--family", "dit"],
        ["dydit", "profile"],
    ]


def test_outputs_replace_outputs() -> None:
    expected = """$ dydit convert --out a \\
    --family dit
one
  two

$ dydit profile
three
"""
    assert with_outputs(BLOCK, ["one   \n  two\n\n", "three"]) == expected
    # What was written is read back the same.
    assert with_outputs(expected, ["one\n  two", "three"]) == expected


def test_a_page_is_run_block_by_block(tmp_path: Path) -> None:
    page = (
        "# Page\n\n```sh\ndydit nothing\n```\n\n```console\n$ dydit --version\nold\n```\n\n"
        "```python\nfrom pathlib import Path\n\nPath('seen').touch()\n```\n"
    )
    said: list[str] = []
    text = run_page(page, tmp_path, said.append)
    assert said == ["$ dydit --version", "python"]
    assert (tmp_path / "seen").exists()
    assert text == page.replace(
        "$ dydit --version\nold", "$ dydit --version\n" + text.split("--version\n")[1].split("\n")[0]
    )
    assert "old" not in text


def test_a_command_that_fails_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exit code 2"):
        run_page("```console\n$ dydit inspect absent.pt\n```\n", tmp_path, lambda line: None)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda page: page.stem)
def test_every_tutorial_runs(page: Path, tmp_path: Path) -> None:
    run_page(page.read_text(encoding="utf-8"), tmp_path, lambda line: None)
