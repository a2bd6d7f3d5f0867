"""The documentation is true: its examples run, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EVERYWHERE = {"--help", "--debug", "--quiet"}
"""Options that stand anywhere; `--plugin FILE` is another."""

READERS_RECIPE = {"prepare": "demo/fashion-mnist-flux"}
"""What stands in for a recipe of the reader's own; demo/fashion-mnist-dit in every other stage."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def run(source: str, page: Path, names: dict) -> None:
    """Run a block as its page shows it, in the namespace of the blocks before it."""
    exec(compile(source, str(page), "exec"), names)


def command_lines(page: Path) -> Iterator[str]:
    """Every line of a page's shell blocks, and every one behind a prompt, continued ones joined."""
    for block in blocks(page, "sh"):
        yield from block.replace("\\\n", " ").splitlines()
    for block in blocks(page, "console"):
        lines = block.replace("\\\n", " ").splitlines()
        yield from (line.removeprefix("$ ") for line in lines if line.startswith("$ "))


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words after ``dydit``) of every command that a page or the head of a recipe shows."""
    sources = [(page.name, line) for page in PAGES for line in command_lines(page)]
    sources += [
        (str(recipe.relative_to(ROOT)), line.removeprefix("#").strip())
        for recipe in sorted((ROOT / "recipes").rglob("*.yaml"))
        for line in recipe.read_text(encoding="utf-8").splitlines()
        if line.startswith("#   dydit ")
    ]
    for source, line in sources:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if "dydit_cli" in words:  # torchrun … -m dydit_cli …
                words = ["dydit", *words[words.index("dydit_cli") + 1 :]]
            if words and words[0] == "dydit":
                yield source, words[1:]


def without_everywhere(words: list[str]) -> list[str]:
    """Without the options that stand anywhere, which the command line takes out before it parses."""
    if "--plugin" in words:
        place = words.index("--plugin")
        words = words[:place] + words[place + 2 :]
    return [word for word in words if word not in EVERYWHERE]


def parsed(words: list[str]) -> Any:
    """The context of the command that the words mean, which nothing runs; None without a command.

    Raises:
        click.ClickException: If there is no such command or option, or a value is of the wrong type.
    """
    import typer

    from dydit_cli.cli.app import app

    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        if not words:
            return None
        assert words[0] in command.commands, f"dydit {words[0]} does not exist"
        command, words = command.commands[words[0]], words[1:]
    return command.make_context(command.name, list(words))


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


def test_the_python_page_names_the_whole_surface() -> None:
    from inspect import signature

    import dydit_cli
    from dydit_cli.families.dynamic_model import DynamicModel

    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    public = {f"`{name}`" for name in dydit_cli.__all__ if name != "__version__"}
    keywords = {f"`{name}`" for name in signature(dydit_cli.load_model).parameters if name != "path"}
    hooks = {
        "begin_dynamic",
        "begin_run",
        "width_gating",
        "make_executor",
        "make_step_runner",
        "require_stored",
        "router_input",
    }
    inherited = {"extract_init_dict", "from_pretrained", "load_state_dict", "save_pretrained", "state_dict"}
    parts = {"budget_shift", "conditioning_modules", "dynamic_blocks", "embed_labels", "embed_time"}
    parts |= {"family", "guided_channels", "is_compiled", "modulation_values"}
    offered = {name for name in vars(DynamicModel) if not name.startswith("_")} - hooks - inherited - parts
    missing = {name for name in public | keywords if name not in text}
    missing |= {name for name in offered if f"model.{name}" not in text}
    assert not missing


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


def test_every_command_in_the_pages_is_complete_and_valid() -> None:
    """Options exist and take such values; keys exist, and what a stage needs is there, with the built-in recipe that is named."""
    from dydit_cli.cli.stage import split_arguments
    from dydit_cli.errors import DyditError
    from dydit_cli.recipe.builtin import builtin_recipes
    from dydit_cli.recipe.loading import load_recipe
    from dydit_cli.recipe.schema import SECTIONS

    built_in = {recipe.name for recipe in builtin_recipes()}
    seen, wrong = 0, []
    for source, words in commands():
        seen += 1
        line = f"{source}: dydit {' '.join(words)}"
        try:
            context = parsed(without_everywhere(words))
            if context is None or "--help" in words or context.command.name not in SECTIONS:
                continue
            stage = context.command.name
            recipe, overrides = split_arguments(context.params.get("arguments") or ())
            options = {
                name: value
                for name, value in context.params.items()
                if name in SECTIONS[stage].model_fields and value not in (None, [], ())
            }
            if stage == "evaluate" and recipe is not None and recipe not in built_in:
                options, recipe = {**options, "samples": recipe}, None
            if recipe is not None and recipe.endswith((".yaml", ".yml")):
                recipe = READERS_RECIPE.get(stage, "demo/fashion-mnist-dit")
            load_recipe(recipe, overrides, stage, options)
        except DyditError as error:
            wrong.append(f"{line}\n    {error.what} {error.why}")
        except Exception as error:
            wrong.append(f"{line}\n    {error}")
    assert not wrong, "\n".join(wrong)
    assert seen > 100


def test_every_recipe_preset_and_shipped_model_in_the_pages_exists() -> None:
    from dydit_cli.checkpoints.builtin import PREFIX, builtin_models
    from dydit_cli.families.registry import preset_named
    from dydit_cli.pipelines.folder import BUILTIN
    from dydit_cli.recipe.builtin import builtin_recipes

    recipes = {recipe.name for recipe in builtin_recipes()}
    folders = {name.partition("/")[0] for name in recipes}
    for source, words in commands():
        for word, following in zip(words, [*words[1:], ""], strict=True):
            value = word.partition("=")[2] or word
            if word == "--preset":
                preset_named(following)
            if value.startswith(PREFIX):
                name = value.removeprefix(PREFIX)
                assert name in builtin_models() or (BUILTIN / name).is_dir(), f"{source}: {word}"
            elif "/" in word and word.partition("/")[0] in folders and "=" not in word:
                assert word in recipes, f"{source}: there is no recipe {word}"


def test_every_option_in_running_text_exists() -> None:
    """`dydit COMMAND …` in a sentence may leave things out, but not make options up."""
    import typer

    from dydit_cli.cli.app import app

    group: Any = typer.main.get_command(app)
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for words in (span.split() for span in re.findall(r"`dydit ([^`]+)`", prose)):
            command = group.commands.get(words[0])
            if command is None:
                # The group's own options, a placeholder, or a list of commands.
                assert not words[0].islower() or words[0].startswith("-"), (
                    f"{page.name}: dydit {words[0]} does not exist"
                )
                continue
            known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
            given = {word.split("=")[0].rstrip(".,") for word in words if word.startswith("--")}
            assert given <= known | EVERYWHERE | {"--plugin"}, f"{page.name}: dydit {' '.join(words)}"


def test_the_map_leads_to_every_page() -> None:
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {
        (ROOT / "docs" / target.partition("#")[0]).resolve()
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
    }
    missing = [page.name for page in (ROOT / "docs").rglob("*.md") if page.resolve() not in linked]
    assert missing == ["README.md"]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"
