"""Random scores: what any other ranking has to beat."""

from __future__ import annotations

from collections.abc import Sequence

from dydit_cli.conversion.importance.units import UnitScores
from dydit_cli.families.unit_weights import UnitWeights
from dydit_cli.randomness import uniform


def random_units(units: Sequence[UnitWeights], seed: int) -> UnitScores:
    """Uniform scores of all units, a function of the seed and of their keys."""
    scores = {unit.order: uniform(seed, (unit.units,), "importance", unit.order) for unit in units}
    return UnitScores(scores, "random", {"seed": seed})
