"""The widths of a whole schedule, decided once before sampling: width routers read the timestep alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from dydit_cli.execution.interface import BlockWidth


@dataclass
class WidthPlan:
    """Widths by the value of t as the model receives it.

    Attributes:
        keep_bias: The dial with which the widths were decided; a plan made with another one is not used.
        entries: t -> widths of every block, masks of shape (1, H) and (1, G) on the CPU.
        embedder: What made the timestep embeddings.
        source: Stamps of the embedder and the routers; a plan whose source has changed is not used.
        hits: Forward passes that found their timestep.
        misses: Forward passes that had to ask the routers.
    """

    keep_bias: float
    entries: Mapping[float, Sequence[BlockWidth]]
    embedder: nn.Module
    source: tuple[object, ...]
    hits: int = field(default=0)
    misses: int = field(default=0)

    def find(self, timestep: Tensor) -> Sequence[BlockWidth] | None:
        """Return the widths for a batch that shares one timestep of the plan, else None; count which."""
        first = timestep.flatten()[0]
        shared = bool((timestep == first).all())
        found = self.entries.get(float(first)) if shared else None
        self.hits += found is not None
        self.misses += found is None
        return found
