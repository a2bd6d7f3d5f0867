"""Which samples may be mirrored while training.

A shirt stays a shirt in a mirror; a digit does not stay a digit, and a latent has no mirror image that the
autoencoder would agree with.
"""

from __future__ import annotations

from dataclasses import dataclass

FASHION_MNIST_NEVER = (5, 7, 9)
"""Sandal, sneaker and ankle boot: all point the same way in Fashion-MNIST; the shipped base models never
saw them mirrored.
"""


@dataclass(frozen=True)
class MirrorRule:
    """Whether samples are mirrored with probability one half, and the labels that never are."""

    enabled: bool
    never: frozenset[int] = frozenset()

    def allows(self, label: int) -> bool:
        """Whether a sample of this class may be mirrored."""
        return self.enabled and label not in self.never
