"""The arguments of a stage command become a section."""

from __future__ import annotations

import pytest

from dydit_cli.cli.stage import STAGES, split_arguments
from dydit_cli.errors import DyditError
from dydit_cli.recipe.schema import SECTIONS


def test_the_stages_are_those_of_the_schema() -> None:
    assert tuple(SECTIONS) == STAGES


@pytest.mark.parametrize(
    ("arguments", "recipe", "overrides"),
    [
        ([], None, []),
        (["a.yaml"], "a.yaml", []),
        (["steps=3"], None, ["steps=3"]),
        (["a.yaml", "steps=3", "out=b"], "a.yaml", ["steps=3", "out=b"]),
        (["steps=3", "a.yaml"], "a.yaml", ["steps=3"]),
        (["runs/lr=1/a.yaml", "out=x/y=z"], "runs/lr=1/a.yaml", ["out=x/y=z"]),
    ],
)
def test_overrides_hold_an_equals_sign(
    arguments: list[str], recipe: str | None, overrides: list[str]
) -> None:
    assert split_arguments(arguments) == (recipe, overrides)


def test_two_recipes_are_one_too_many() -> None:
    with pytest.raises(DyditError, match=r"a\.yaml and 400") as caught:
        split_arguments(["a.yaml", "400"])
    assert "steps=400" in caught.value.fix
