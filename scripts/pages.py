"""Tables that scripts measure, put into the pages of the documentation."""

from __future__ import annotations

from pathlib import Path


def replace_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two markers of a page.

    Raises:
        SystemExit: If the page does not have both, in this order; it stays as it is.
    """
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page} has no place for the table: {begin} and {end} must stand in it")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
