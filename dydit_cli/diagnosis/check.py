"""One thing that was looked at: what was found, whether that is well, and what mends it if not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a check came out."""

    GOOD = "good"
    NOTE = "note"
    """Nothing is wrong; something is missing that only some commands use."""
    WARNING = "warning"
    """It works, but slower or with less than the machine has."""
    BROKEN = "broken"
    """Something that dydit needs is missing or does not work."""


@dataclass(frozen=True)
class Check:
    """What was looked at.

    Attributes:
        area: The heading that it stands under.
        name: What was looked at.
        verdict: How it came out.
        found: What is there, in words.
        fix: What to do about it; empty where there is nothing to do.
    """

    area: str
    name: str
    verdict: Verdict
    found: str
    fix: str = ""

    def as_json(self) -> dict[str, str]:
        """Plain values."""
        return {name: str(value) for name, value in asdict(self).items()}


def worst(checks: Iterable[Check]) -> Verdict:
    """The gravest verdict among ``checks``."""
    order = list(Verdict)
    return max((check.verdict for check in checks), key=order.index, default=Verdict.GOOD)
