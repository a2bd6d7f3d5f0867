"""The page of upstream defects holds each reproduction as its file has it, with an output that was printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.upstream_page import LIBRARIES, PAGE, cases, read_case


def test_the_page_shows_every_reproduction_as_it_is() -> None:
    page = PAGE.read_text(encoding="utf-8")
    found = cases()
    assert len(found) > 10
    for case in found:
        assert f"## {case.title}\n\n{case.text}\n" in page, "run: python scripts/upstream_page.py --write"
        assert f"{case.code}\n```\n\n```text\n" in page, f"{case.file.name} has changed"
    assert page.count("\n## ") == len(found)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.file.stem)
def test_a_reproduction_says_whose_defect_it_is_and_what_dydit_does(case) -> None:  # type: ignore[no-untyped-def]
    library, _, rest = case.title.partition(": ")
    assert library in LIBRARIES
    assert case.file.name.startswith(f"{library}_")
    assert rest
    assert "\ndydit: " in case.text


def test_a_reproduction_without_words_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "torch_silent.py"
    file.write_text('"""A title alone"""\n', encoding="utf-8")
    with pytest.raises(ValueError, match="needs a docstring"):
        read_case(file)
