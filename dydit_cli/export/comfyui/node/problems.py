"""The one exception that a user of the node sees."""

from __future__ import annotations


class NodeError(ValueError):
    """Something that the user can put right.

    Args:
        what: What is wrong, in a sentence.
        why: Why that does not work.
        fix: What to do about it.
    """

    def __init__(self, what: str, *, why: str, fix: str) -> None:
        super().__init__(f"{what} {why} {fix}")
