"""Values are read the same way in a file, after `key=` and as an option."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dydit_cli.recipe import values


@pytest.mark.parametrize(
    ("written", "number"),
    [("400", 400), ("2e5", 200_000), ("200_000", 200_000), (7, 7), (3.0, 3), ("-1", -1)],
)
def test_whole_numbers(written: object, number: int) -> None:
    assert values.whole(written) == number
    assert type(values.whole(written)) is int


@pytest.mark.parametrize("written", ["0.5", "many", True, None, [1], "inf", "nan", ""])
def test_what_is_no_whole_number(written: object) -> None:
    with pytest.raises(ValueError, match="whole number"):
        values.whole(written)


def test_whole_numbers_are_exact_beyond_floats() -> None:
    assert values.whole("9007199254740993") == 2**53 + 1


@pytest.mark.parametrize(
    ("written", "number"), [("1e-3", 1e-3), (1, 1.0), (".inf", math.inf), ("-inf", -math.inf)]
)
def test_numbers(written: object, number: float) -> None:
    assert values.real(written) == number


@pytest.mark.parametrize("written", ["x", True, None, ["1"], "nan", ".nan"])
def test_what_is_no_number(written: object) -> None:
    with pytest.raises(ValueError, match="must be a number"):
        values.real(written)


@pytest.mark.parametrize(("written", "truth"), [("no", False), ("True", True), ("on", True), (False, False)])
def test_flags(written: object, truth: bool) -> None:
    assert values.flag(written) is truth


@pytest.mark.parametrize("written", ["maybe", 1, None, "0"])
def test_what_is_no_flag(written: object) -> None:
    with pytest.raises(ValueError, match="true or false"):
        values.flag(written)


def test_text_keeps_what_was_written() -> None:
    assert values.text("007") == "007"
    assert values.text(Path("runs/a")) == "runs/a"
    assert values.text(2024) == "2024"


@pytest.mark.parametrize("written", ["", "  ", "a\0b", True, None, ["a"]])
def test_what_is_no_text(written: object) -> None:
    with pytest.raises(ValueError):
        values.text(written)


def test_a_location_may_start_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert values.location("~/runs") == "/somewhere/runs"
    assert values.location("runs/~") == "runs/~"


def test_an_unknown_home_is_refused() -> None:
    with pytest.raises(ValueError, match="home folder"):
        values.location("~nobody-of-this-name/x")


@pytest.mark.parametrize("written", ["0, 1", "[0,1]", ["0", "1"], [0, 1], (0, 1)])
def test_labels(written: object) -> None:
    assert values.labels(written) == (0, 1)


def test_a_single_label_needs_no_list() -> None:
    assert values.labels(3) == values.labels("3") == (3,)


@pytest.mark.parametrize("written", ["", "[]", [], "a", "1,b", [True], None, "-1"])
def test_what_is_no_list_of_labels(written: object) -> None:
    with pytest.raises(ValueError):
        values.labels(written)


def test_mirror_is_a_flag_or_labels() -> None:
    assert values.flag_or_labels("false") is False
    assert values.flag_or_labels("5,7,9") == (5, 7, 9)
    with pytest.raises(ValueError, match="true, false or labels"):
        values.flag_or_labels("sometimes")


def test_long_values_are_shortened() -> None:
    assert len(values.shown("x" * 1000)) == 80


@pytest.mark.parametrize("written", ["mp4,gif", "[mp4, gif]", ["mp4", "gif"], ("mp4", " gif ")])
def test_names(written: object) -> None:
    assert values.names(written) == ("mp4", "gif")
    assert values.names("mp4") == ("mp4",)


@pytest.mark.parametrize("written", ["", "[]", [], 3, None, True])
def test_what_are_no_names(written: object) -> None:
    with pytest.raises(ValueError, match="name"):
        values.names(written)
