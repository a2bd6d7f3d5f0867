"""The documentation is true: its examples run, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def run(source: str, page: Path, names: dict) -> None:
    """Run a block as its page shows it, in the namespace of the blocks before it."""
    exec(compile(source, str(page), "exec"), names)


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words after ``dydit``) of every command line in a shell block."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == "dydit":
                    yield page.name, words[1:]


def test_the_examples_of_the_python_page_run() -> None:
    page = ROOT / "docs" / "python.md"
    names: dict = {}
    for source in blocks(page, "python"):
        run(source, page, names)
    assert names["plan"].hits == 1
    assert names["plan"].misses == 0
    assert names["prediction"].shape == names["output"].sample.shape
    # Straight after conversion everything is on.
    assert names["dynamic"].routed == names["static"].routed


def test_the_example_of_the_latte_page_runs() -> None:
    names: dict = {}
    for source in blocks(ROOT / "docs" / "latte.md", "python"):
        run(source, ROOT / "docs" / "latte.md", names)
    assert names["noise"].shape == (2, 4, 8, 8, 8)


def test_the_example_of_the_flux_page_runs() -> None:
    names: dict = {}
    for source in blocks(ROOT / "docs" / "flux.md", "python"):
        run(source, ROOT / "docs" / "flux.md", names)
    assert names["velocity"].shape == (2, 4, 8, 8)
    assert len(names["plan"]) == 4


def test_the_example_of_the_readme_runs(own_folder: Path) -> None:
    from dydit_cli.artifacts import save_model
    from dydit_cli.families.registry import family_named

    latent = {"sample_size": 32, "patch_size": 8, "in_channels": 4, "num_classes": 1000}
    model = family_named("dit").build(
        {**latent, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4}
    )
    folder = own_folder / "runs" / "trained"
    folder.mkdir(parents=True)
    save_model(model, folder)
    (source,) = blocks(ROOT / "README.md", "python")
    names: dict = {}
    run(source, ROOT / "README.md", names)
    assert names["prediction"].shape == (2, 8, 32, 32)
    assert names["report"].total > 0


def test_every_command_and_option_in_the_pages_exists() -> None:
    import typer

    from dydit_cli.cli.app import app

    seen = 0
    for page, words in commands():
        if words == ["--help"]:
            continue
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            assert words, f"{page}: a command is missing"
            assert words[0] in command.commands, f"{page}: dydit {words[0]} does not exist"
            command = command.commands[words.pop(0)]
        known = {
            name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        # These stand anywhere.
        known |= {"--help", "--debug", "--plugin"}
        unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in known]
        assert not unknown, f"{page}: dydit {command.name} has no {unknown}"
        seen += 1
    assert seen > 10


def test_the_recipe_of_the_recipes_page_is_valid(own_folder: Path) -> None:
    from dydit_cli.recipe.loading import load_recipe

    (text,) = blocks(ROOT / "docs" / "recipes.md", "yaml")
    file = own_folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    recipe = load_recipe(str(file))
    assert list(recipe.sections) == ["convert", "finetune", "sample"]


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get where it is shown."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"
