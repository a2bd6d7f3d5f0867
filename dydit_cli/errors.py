"""The one exception a user sees, in three parts: what happened, why, and how to fix it.

Everything that a user can get wrong ends here; the command line prints the three parts and leaves with exit code 2.
A Python user catches `DyditError` and reads the same three fields.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DyditError(Exception):
    """A mistake of the user's or of the input, explained.

    Args:
        what: One sentence that says what went wrong, with the values met.
        why: One sentence that says what was found or required.
        fix: One sentence that says what to do now.
    """

    def __init__(self, what: str, *, why: str, fix: str) -> None:
        super().__init__(f"{what}\n  why: {why}\n  fix: {fix}")
        self.what = what
        self.why = why
        self.fix = fix


def did_you_mean(name: str, known: Iterable[str], likeness: float = 0.5) -> str:
    """Return ``did you mean 'x'?`` for the nearest known name, or an empty string if none is near."""
    nearest = get_close_matches(str(name), [str(option) for option in known], n=1, cutoff=likeness)
    return f"did you mean '{nearest[0]}'?" if nearest else ""
