"""What a network must offer to serve a metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """What a network says of N images, fp32 on the CPU.

    Attributes:
        pooled: (N, D) for the Fréchet and kernel distances, precision and recall.
        spatial: (N, S) for sFID.
        logits: (N, K) for the inception score, and for class accuracy where the network knows the classes.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.pooled)


def joined(parts: list[Features]) -> Features:
    """Batches as one."""
    return Features(
        torch.cat([part.pooled for part in parts]),
        torch.cat([part.spatial for part in parts]),
        torch.cat([part.logits for part in parts]),
    )


class Extractor(Protocol):
    """A network with its weights.

    Attributes:
        name: For reports.
        title: For people.
        sha256: Of the weights' file; results of different hashes cannot be compared.
        classes: How many classes the network can tell apart as the data's own labels; None if its classes are others.
    """

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def classes(self) -> int | None: ...

    def features(self, images: Tensor) -> Features:
        """What the network says of (B, H, W, C) bytes, C 1 or 3.

        Raises:
            DyditError: If it cannot take such images.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What a report records."""
        ...


def on_cpu(pooled: Tensor, spatial: Tensor, logits: Tensor) -> Features:
    """Features as reports keep them."""
    return Features(*(part.detach().to("cpu", torch.float32) for part in (pooled, spatial, logits)))
