"""adaLN values of a schedule, computed before it runs: they depend on the timestep and the label alone.

adaLN layers hold a third of a DiT's parameters, and a step reads all of them for a few rows. For a whole schedule the rows come
together, so that the weights are read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dydit_cli.execution.interface import ConditionedModel

ROWS_AT_ONCE = 4096
REMEMBERED_BATCHES = 64


class ModulationTable:
    """adaLN values by timestep and label, each (6L + 2) * C wide.

    Args:
        values: (S, D, width).
        timesteps: The S values of t.
        labels: The D labels.
    """

    def __init__(self, values: Tensor, timesteps: Sequence[float], labels: Sequence[int]) -> None:
        self._steps = dict(zip(timesteps, values.unbind(0), strict=True)) if timesteps else {}
        self._row = {label: row for row, label in enumerate(labels)}
        self._rows: dict[tuple[int, ...], Tensor | None] = {}
        self.nbytes = values.numel() * values.element_size()

    def __len__(self) -> int:
        """Timesteps that are held."""
        return len(self._steps)

    @classmethod
    def build(
        cls, model: ConditionedModel, timesteps: Tensor, labels: Sequence[int], budget: float
    ) -> ModulationTable | None:
        """Compute the values of as many of the (S,) ``timesteps`` as fit into ``budget`` bytes; None if not even one does."""
        distinct = sorted(set(labels))
        if not distinct or not len(timesteps):
            return None
        device = timesteps.device
        first = model.embed_time(timesteps[:1])
        labels_embedded = model.embed_labels(torch.tensor(distinct, device=device))
        width = model.modulation_values(first + labels_embedded[:1])
        fitting = int(budget // (width.numel() * width.element_size() * len(distinct)))
        kept = timesteps[:fitting]
        if not len(kept):
            return None
        condition = (model.embed_time(kept)[:, None] + labels_embedded[None]).flatten(0, 1)
        values = torch.cat([model.modulation_values(rows) for rows in condition.split(ROWS_AT_ONCE)])
        return cls(values.view(len(kept), len(distinct), -1), kept.tolist(), distinct)

    def find(self, timesteps: Sequence[float], labels: tuple[int, ...]) -> Tensor | None:
        """(B, width) of a batch, or None unless all of it is there. ``timesteps`` has one entry for all, or B."""
        if len(timesteps) == 1:
            values = self._steps.get(timesteps[0])
            if values is None:
                return None
            if labels not in self._rows:
                if len(self._rows) >= REMEMBERED_BATCHES:
                    self._rows.clear()
                rows = [self._row.get(label, -1) for label in labels]
                self._rows[labels] = torch.tensor(rows, device=values.device) if -1 not in rows else None
            index = self._rows.get(labels)
            return values.index_select(0, index) if index is not None else None
        found = []
        for t, label in zip(timesteps, labels, strict=True):
            values, row = self._steps.get(t), self._row.get(label)
            if values is None or row is None:
                return None
            found.append(values[row])
        return torch.stack(found)


def values_of_batch(
    model: ConditionedModel, timesteps: Sequence[float], labels: tuple[int, ...], times: Tensor
) -> Tensor | None:
    """(B, width) of a batch in which some samples share timestep and label, each pair computed once; None if none do.

    Under guidance half of a batch has the null class, and a batch is often larger than the number of classes in it.
    """
    pairs = list(zip(timesteps if len(timesteps) > 1 else [*timesteps] * len(labels), labels, strict=True))
    distinct = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
    if len(distinct) == len(pairs):
        return None
    device = times.device
    firsts = torch.tensor([pairs.index(pair) for pair in distinct], device=device)
    condition = model.embed_time(times.index_select(0, firsts))
    condition = condition + model.embed_labels(torch.tensor([label for _, label in distinct], device=device))
    rows = torch.tensor([distinct[pair] for pair in pairs], device=device)
    return model.modulation_values(condition).index_select(0, rows)
