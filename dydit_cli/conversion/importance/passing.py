"""The magnitude ranking of weights that pass by one at a time, as a streamed conversion meets them.

The formula is that of `magnitude.py`: a unit's score is the norm of its rows times the norm of its columns, summed over the pairs
that it has. Only the norms are kept, a few numbers a unit, so that nothing is read twice.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dydit_cli.families.unit_weights import Span, UnitWeights


class PassingMagnitude:
    """Scores of units from their weights, in whatever order those come.

    Args:
        units: What to score.
    """

    def __init__(self, units: Iterable[UnitWeights]) -> None:
        self._rows: Mapping[str, list[tuple[Span, int]]] = defaultdict(list)
        self._columns: Mapping[str, list[tuple[Span, int]]] = defaultdict(list)
        for unit in units:
            for pair in unit.pairs:
                self._rows[pair.rows.key].append((pair.rows, unit.units))
                self._columns[pair.columns.key].append((pair.columns, unit.units))
        # Made at once: small tensors that stay, allocated between large ones that go, would leave holes in the heap that no
        # large tensor fits into again (seen: 2.5 GB of them after 57 blocks of FLUX).
        self._norms = {
            (span, by_row): torch.full((units,), math.nan)
            for by_row, table in ((True, self._rows), (False, self._columns))
            for spans in table.values()
            for span, units in spans
        }

    @torch.no_grad()
    def observe(self, key: str, tensor: Tensor) -> None:
        """Take the norms of a weight; keys that hold no unit pass."""
        for span, units in self._rows.get(key, ()):
            part = tensor[span.start : span.stop].float()
            self._norms[span, True].copy_(part.reshape(units, -1).norm(dim=1))
        for span, units in self._columns.get(key, ()):
            part = tensor[:, span.start : span.stop].float()
            if units == part.shape[1]:
                self._norms[span, False].copy_(part.norm(dim=0))
            else:
                cut = part.unflatten(1, (units, -1)).transpose(0, 1).flatten(1)
                self._norms[span, False].copy_(cut.norm(dim=1))

    def scores(self, unit: UnitWeights) -> Tensor:
        """(units,) fp32, once all of its weights have passed; larger is more."""
        products = [self._norms[pair.rows, True] * self._norms[pair.columns, False] for pair in unit.pairs]
        return torch.stack(products).sum(dim=0)
