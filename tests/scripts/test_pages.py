"""Tables in pages: what stands around them stays, and a page without a place for one stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.pages import replace_between


def test_only_what_stands_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before <a>old<b> after", encoding="utf-8")
    replace_between(page, "<a>", "<b>", "new")
    assert page.read_text(encoding="utf-8") == "before <a>\nnew\n<b> after"


@pytest.mark.parametrize("content", ["no marker", "<a>open", "<b>turned<a>"])
def test_a_page_without_a_place_stays_as_it_is(tmp_path: Path, content: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match="no place for the table"):
        replace_between(page, "<a>", "<b>", "new")
    assert page.read_text(encoding="utf-8") == content
