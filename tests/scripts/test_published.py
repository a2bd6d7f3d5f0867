"""What is published stays what the results give: the page, and the README's table."""

from __future__ import annotations

from pathlib import Path

from scripts import readme_table
from scripts.reproduction.pictures import PLOTS
from scripts.reproduction.report import page, read_results


def test_the_published_page_and_table_are_made_of_the_published_results(repository: Path) -> None:
    docs = repository / "docs"
    results = read_results(docs / "results.json")
    text = (docs / "results.md").read_text(encoding="utf-8")
    plots = [plot.file for plot in PLOTS if f"images/{plot.file}" in text]
    assert plots
    assert all((docs / "images" / name).exists() for name in plots)
    assert page(results, plots, quick=False) == text
    assert not results["circumstances"]["quick"]
    block = (repository / "README.md").read_text(encoding="utf-8").partition(readme_table.BEGIN)[2]
    assert block.partition(readme_table.END)[0].strip() == readme_table.table(results)
