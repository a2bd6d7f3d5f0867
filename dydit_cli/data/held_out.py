"""Which samples never train, for data sets that bring no test part of their own.

The choice depends on the samples' names alone, not on the training seed: two runs on one data set, or a run
and its static control, are always compared on images that neither has seen.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from dydit_cli.data.source import Source
from dydit_cli.errors import DyditError

MAX_IMAGES = 1000
MAX_SHARE = 10
"""At most one sample in this many is held out (but always at least one)."""


def split(source: Source) -> tuple[Tensor, Tensor]:
    """Return the (training, held-out) indices: hashed, stratified by class, at most 1,000 and at most 10 %.

    Raises:
        DyditError: if there are fewer than two samples.
    """
    count = len(source)
    if count < 2:
        raise DyditError(
            f"The data set has {count} sample(s).",
            why="At least one sample must be held out to measure the ratio, and one must train.",
            fix="Give a larger data set.",
        )
    quota = _quotas(torch.bincount(source.labels), max(1, min(MAX_IMAGES, count // MAX_SHARE)))
    held_out = torch.zeros(count, dtype=torch.bool)
    for label, size in enumerate(quota):
        if size:
            members = torch.nonzero(source.labels == label).flatten().tolist()
            chosen = sorted(members, key=lambda index: _hash(source.key(index)))[:size]
            held_out[chosen] = True
    return torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()


def _hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _quotas(counts: Tensor, total: int) -> list[int]:
    """Share ``total`` among classes by size, by largest remainders."""
    shares = [total * int(count) / int(counts.sum()) for count in counts]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda label: (quotas[label] - shares[label], label))
    for label in by_remainder[: total - sum(quotas)]:
        quotas[label] += 1
    return quotas
