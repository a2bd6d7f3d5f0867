"""Sizes as people read them."""

from __future__ import annotations


def megabytes(count: int) -> str:
    """Bytes in MB, or in kB where there are few."""
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
