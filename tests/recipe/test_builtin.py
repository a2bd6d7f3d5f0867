"""The recipes that come with the package are complete, say how they are run, and are found by name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dydit_cli.errors import DyditError
from dydit_cli.recipe.builtin import builtin_recipe, builtin_recipes, find_recipe
from dydit_cli.recipe.loading import load_recipe
from dydit_cli.recipe.schema import SECTIONS, FinetuneSection

NAMES = [recipe.name for recipe in builtin_recipes()]
COMMAND = re.compile(r"^#\s+dydit (?P<stage>\w+)\s+(?P<words>.*)$", re.MULTILINE)


def commands(name: str) -> list[tuple[str, list[str]]]:
    text = find_recipe(name).read_text(encoding="utf-8")
    return [(match["stage"], shlex.split(match["words"])) for match in COMMAND.finditer(text)]


def finetune(name: str, *overrides: str) -> FinetuneSection:
    section = load_recipe(name, overrides, "finetune").get(FinetuneSection)
    assert section is not None
    return section


def stages_of(name: str) -> list[str]:
    """All stages, but preparation only where text encoders have to run first; a FLUX is evaluated by its folder of samples.

    What is there to be compared has the stages that comparing takes.
    """
    if name.startswith("baselines/"):
        return ["convert", "finetune", "evaluate"]
    if name.startswith("verify/"):
        return ["convert", "evaluate"]
    left_out = {"evaluate"} if name.endswith("-flux") else {"prepare"}
    return [stage for stage in SECTIONS if stage not in left_out]


def test_what_comes_with_the_package() -> None:
    assert NAMES == [
        "baselines/budgets",
        "baselines/dynamic",
        "baselines/lora",
        "baselines/ordered",
        "baselines/pruned-magnitude",
        "baselines/pruned-random",
        "baselines/pruned-taylor",
        "baselines/random-routers",
        "baselines/static-control",
        "baselines/td-lora",
        "baselines/tokens-only",
        "baselines/width-only",
        "demo/fashion-mnist-dit",
        "demo/fashion-mnist-flux",
        "demo/fashion-mnist-latte",
        "demo/fashion-mnist-sit",
        "dit-b-2-256/full",
        "dit-s-2-256/full",
        "dit-xl-2-256/full",
        "dit-xl-2-256/lora",
        "dit-xl-2-256/td-lora",
        "latte-xl-2-256/full",
        "latte-xl-2-256/td-lora",
        "sit-xl-2-256/full",
        "sit-xl-2-256/td-lora",
        "verify/dit-xl-2-256",
        "verify/dydit-xl-2-256-0.5",
        "verify/dydit-xl-2-256-0.7",
        "verify/sit-xl-2-256",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_complete_and_names_itself(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert list(recipe.sections) == stages_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_opens_with_the_commands_that_run_it(name: str) -> None:
    assert find_recipe(name).read_text(encoding="utf-8").startswith("#")
    found = commands(name)
    assert [stage for stage, _ in found][: len(stages_of(name))] == stages_of(name)
    for stage, words in found:
        assert words[0] == name
        load_recipe(words[0], words[1:], stage)


def test_the_table_of_the_paper() -> None:
    small, base, large = (finetune(f"dit-{size}-2-256/full") for size in ("s", "b", "xl"))
    assert [section.steps for section in (small, base, large)] == [50_000, 100_000, 200_000]
    assert [section.complete_branch_steps for section in (small, base, large)] == [0, 0, 30_000]
    for section in (small, base, large):
        assert (section.batch_size, section.learning_rate, section.weight_decay) == (256, 1e-4, 0)
        assert (section.target_ratio, section.ratio_weight, section.temperature) == (0.5, 1, 5)
        assert (section.full_width_steps, section.ramp_steps, section.ema_decay) == (100, 1000, 0.9999)


@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("dit-s-2-256/full", {0.9, 0.7, 0.3}),
        ("dit-b-2-256/full", {0.9, 0.7, 0.3}),
        ("dit-xl-2-256/full", {0.7, 0.6, 0.3}),
    ],
)
def test_every_other_row_of_the_table_has_its_command(name: str, ratios: set[float]) -> None:
    rows = [finetune(name, *words[1:]) for stage, words in commands(name) if stage == "finetune"]
    assert {row.target_ratio for row in rows} - {0.5} == ratios
    assert len({row.out for row in rows}) == len(rows), "two rows would write into one folder"


def test_the_row_of_0_7_follows_the_released_code() -> None:
    words = next(words for _, words in commands("dit-xl-2-256/full") if "target_ratio=0.7" in words)
    row = finetune(*words)
    assert (row.steps, row.ramp_steps, row.complete_branch_steps, row.learning_rate) == (
        150_000,
        5000,
        150_000,
        2.5e-5,
    )


BASELINES = [name for name in NAMES if name.startswith("baselines/")]


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_differ_in_what_they_compare_alone(name: str) -> None:
    """Equal steps, data, batches, precision and evaluation; adapters alone have a learning rate of their own."""
    reference, recipe = (load_recipe(each) for each in ("baselines/dynamic", name))
    of_training = (
        "data",
        "steps",
        "batch_size",
        "seed",
        "weight_decay",
        "ema_decay",
        "label_dropout",
        "mirror",
        "mixed_precision",
    )
    for section, keys in (
        ("finetune", of_training),
        ("evaluate", ("num_images", "sampler", "steps", "guidance", "seed")),
    ):
        mine, its = (each.sections[section].model_dump() for each in (recipe, reference))
        assert [mine[key] for key in keys] == [its[key] for key in keys]
    mine, its = (each.sections["finetune"].model_dump() for each in (recipe, reference))
    assert mine["learning_rate"] == its["learning_rate"] or "lora" in name


def test_a_name_may_carry_its_suffix() -> None:
    assert find_recipe("dit-s-2-256/full.yaml") == find_recipe("dit-s-2-256/full")


def test_a_file_beats_a_name(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "fashion-mnist-dit").write_text("schema: 1\n")
    assert find_recipe("demo/fashion-mnist-dit") == Path("demo/fashion-mnist-dit")


@pytest.mark.parametrize(
    ("asked", "near"),
    [("dit-xl/full", "dit-xl-2-256/full"), ("mine.yml", "mine.yaml"), ("recipes/full", None)],
)
def test_an_unknown_recipe_names_what_is_near(tmp_path: Path, asked: str, near: str | None) -> None:
    (tmp_path / "mine.yaml").write_text("schema: 1\n")
    with pytest.raises(DyditError) as caught:
        find_recipe(asked)
    if near:
        assert caught.value.fix == f"did you mean '{near}'?"


def test_only_a_name_is_copied(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("schema: 1\n")
    with pytest.raises(DyditError, match="no built-in recipe"):
        builtin_recipe("mine.yaml")


def test_a_folder_of_recipes_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b/one.yaml", "a/two.yaml", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [recipe.name for recipe in builtin_recipes(tmp_path)] == ["a/two", "b/one"]
