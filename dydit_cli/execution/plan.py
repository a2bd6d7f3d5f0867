"""The widths of a schedule, decided once: width routers read the timestep alone.

A plan is made before sampling, or grows while a model runs: a timestep that nobody announced asks the routers once and is
remembered. So a pipeline that knows nothing of plans has one after its first run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from dydit_cli.execution.interface import BlockWidth
from dydit_cli.execution.modulation import ModulationTable

REMEMBERED_TIMESTEPS = 1024


@dataclass(frozen=True)
class Part:
    """Samples of a batch with one width.

    Attributes:
        active: Ranks of the active units, ascending.
        rows: Indices of the samples, or None for the whole batch.
    """

    active: tuple[int, ...]
    rows: Tensor | None


@dataclass(frozen=True)
class CompactWidth(BlockWidth):
    """A block's width with its masks read on the host.

    Attributes:
        parts: Of each of `BlockWidth.masks`, the batch cut into its distinct rows.
    """

    parts: tuple[tuple[Part, ...], ...] = ()

    @property
    def head_parts(self) -> tuple[Part, ...]:
        """The batch by active heads."""
        return self.parts[0]

    @property
    def group_parts(self) -> tuple[Part, ...]:
        """The batch by active groups."""
        return self.parts[1]

    @classmethod
    def of(
        cls, masks: Sequence[Tensor], parts: Sequence[tuple[Part, ...]], time: Tensor | None
    ) -> CompactWidth:
        """Of masks in the order of `BlockWidth.masks`, their parts, and the `BlockWidth.time` that they were decided from."""
        context = masks[2] if len(masks) > 2 else None
        return cls(masks[0], masks[1], context, time, tuple(parts))


@dataclass(frozen=True)
class PlannedStep:
    """The widths of all blocks at one timestep.

    Attributes:
        widths: Of each block, masks of one row on the model's device, and the timestep embedding that all of them share.
        active: Of each block, the ranks that are on in each of its masks.
        position: The place in the schedule, or None for a timestep that nobody announced.
    """

    widths: tuple[BlockWidth, ...]
    active: tuple[tuple[tuple[int, ...], ...], ...]
    position: int | None = None
    _expanded: dict[int, tuple[CompactWidth, ...]] = field(default_factory=dict, compare=False, repr=False)

    def of_batch(self, batch: int) -> Sequence[CompactWidth]:
        """The widths of ``batch`` samples that share the timestep."""
        found = self._expanded.get(batch)
        if found is None:
            found = tuple(
                CompactWidth.of(
                    [mask.expand(batch, -1) for mask in width.masks],
                    [(Part(units, None),) for units in active],
                    width.time,
                )
                for width, active in zip(self.widths, self.active, strict=True)
            )
            # One batch size at a time is what samplers have.
            self._expanded.clear()
            self._expanded[batch] = found
        return found


def active_units(mask: Tensor) -> list[tuple[int, ...]]:
    """The ranks that are on in each row of a (B, U) mask on the CPU."""
    return [tuple(unit for unit, on in enumerate(values) if on) for values in mask.tolist()]


def grouped(actives: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Part, ...]:
    """Cut a batch into parts of one width each."""
    rows_by_active: dict[tuple[int, ...], list[int]] = {}
    for row, active in enumerate(actives):
        rows_by_active.setdefault(active, []).append(row)
    if len(rows_by_active) == 1:
        return (Part(next(iter(rows_by_active)), None),)
    return tuple(Part(active, torch.tensor(rows, device=device)) for active, rows in rows_by_active.items())


def mixed(steps: Sequence[PlannedStep], device: torch.device) -> list[CompactWidth]:
    """The widths of a batch with a planned timestep for each sample."""
    embedded = [step.widths[0].time for step in steps if step.widths]
    times = [row for row in embedded if row is not None]
    time = torch.cat(times) if len(times) == len(steps) else None
    return [
        CompactWidth.of(
            [torch.cat(rows) for rows in zip(*(step.widths[block].masks for step in steps), strict=True)],
            [grouped(units, device) for units in zip(*(step.active[block] for step in steps), strict=True)],
            time,
        )
        for block in range(len(steps[0].widths))
    ]


class WidthPlan:
    """Widths by the value of t as the model receives it, and what else a schedule allows to prepare.

    A plan knows nothing of weights: the executor drops it when the model is no longer what it was made from.

    Args:
        keep_bias: The dial of the announced timesteps. Others of its values are remembered beside them as they come.
        steps: The announced timesteps, in order.
        modulation: adaLN values, if labels were announced.
        policies: How many layers keep their weights in which way (`policies.py`).

    Attributes:
        hits: Forward passes whose timesteps were all known.
        misses: Forward passes that had to ask the routers.
    """

    def __init__(
        self,
        keep_bias: float = 0.0,
        steps: Mapping[float, PlannedStep] | None = None,
        modulation: ModulationTable | None = None,
        policies: Counter[str] | None = None,
    ) -> None:
        self.keep_bias = keep_bias
        self.modulation = modulation
        self.policies = policies or Counter()
        self.hits = 0
        self.misses = 0
        self._announced = {(keep_bias, t): step for t, step in (steps or {}).items()}
        self._remembered: dict[tuple[float, float], PlannedStep] = {}
        # Counting and remembering from two threads at once must lose nothing.
        self._lock = Lock()

    def __len__(self) -> int:
        """Timesteps that are known, announced or remembered."""
        return len(self._announced) + len(self._remembered)

    def step(self, keep_bias: float, t: float) -> PlannedStep | None:
        """The widths at t under a dial, if they are known."""
        key = (keep_bias, t)
        return self._announced.get(key) or self._remembered.get(key)

    def find(self, keep_bias: float, timesteps: Sequence[float]) -> list[PlannedStep] | None:
        """The widths of each of ``timesteps``, or None unless all are known."""
        found = []
        for t in timesteps:
            step = self.step(keep_bias, t)
            if step is None:
                return None
            found.append(step)
        return found

    def count(self, hit: bool) -> None:
        """Note that a forward found its widths, or did not."""
        with self._lock:
            self.hits += hit
            self.misses += not hit

    def remember(self, keep_bias: float, t: float, step: PlannedStep) -> None:
        """Keep what the routers said about a timestep that nobody announced; of very many, the latest."""
        with self._lock:
            while len(self._remembered) >= REMEMBERED_TIMESTEPS:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[keep_bias, t] = step
