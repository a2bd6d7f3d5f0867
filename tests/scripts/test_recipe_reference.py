"""The recipe reference is the schema's: the page in docs/ is what the script makes, and a key that says nothing is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import BeforeValidator

from dydit_cli.recipe.schema import SECTIONS, Section
from dydit_cli.recipe.values import (
    Budgets,
    Count,
    Flag,
    Mirror,
    OutFolder,
    Probability,
    Seed,
    Share,
    Text,
    names,
)
from scripts.recipe_reference import FILE, keys, meanings, reference, split_families, takes


def test_the_page_is_what_the_schema_says(repository: Path) -> None:
    page = (repository / FILE).read_text(encoding="utf-8")
    assert page == reference(), "run: python scripts/recipe_reference.py --write"


@pytest.mark.parametrize("section", SECTIONS.values(), ids=list(SECTIONS))
def test_every_key_says_what_it_means_and_nothing_else_is_said(section: type[Section]) -> None:
    said = meanings(section)
    assert set(said) == set(section.model_fields)
    for name, meaning in said.items():
        assert meaning.endswith("."), f"{name}: a meaning ends in the middle of a sentence: {meaning}"


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Count, "whole number, ≥ 1"),
        (Seed, "whole number, ≥ 0"),
        (Share | None, "number, > 0, ≤ 1"),
        (Probability, "number, ≥ 0, < 1"),
        (Flag, "true or false"),
        (Text | None, "text"),
        (OutFolder, "path or name"),
        (Mirror, "true, false, or labels (`5,7`)"),
        (Budgets | None, "numbers (`0.3,1.0`)"),
        (Literal["a", "b"], "`a`, `b`"),
        (Annotated[tuple[Literal["mp4", "gif"], ...], BeforeValidator(names)], "some of `mp4`, `gif`"),
    ],
)
def test_types_are_told_in_words(annotation: object, words: str) -> None:
    assert takes(annotation) == words


def test_a_meaning_may_begin_with_the_families_that_take_the_key() -> None:
    assert split_families("DiT, SiT: times of a device.") == ("DiT, SiT", "Times of a device.")
    assert split_families("What is learned: this or that.") == ("", "What is learned: this or that.")


def test_a_key_without_a_meaning_is_refused() -> None:
    class Silent(Section):
        """A section.

        Attributes:
            steps: How many.
        """

        stage: ClassVar[str] = "convert"

        steps: Count = 1
        width: Count | None = None

    found = keys(Silent)
    first = next(found)
    assert (first.name, first.takes, first.default, first.meaning) == (
        "steps",
        "whole number, ≥ 1",
        "`1`",
        "How many.",
    )
    with pytest.raises(ValueError, match="does not say what width means"):
        next(found)
