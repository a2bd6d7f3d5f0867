"""Random scores: the control that shows what a ranking is worth."""

from __future__ import annotations

from dydit_cli.conversion.importance.scores import Importance
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.randomness import uniform


def random(geometry: Geometry, seed: int) -> Importance:
    """Score units by chance, a function of ``seed`` alone."""
    heads = uniform(seed, (geometry.depth, geometry.num_heads), "importance", "heads")
    channels = uniform(seed, (geometry.depth, geometry.mlp_hidden), "importance", "channels")
    return Importance(heads, channels, "random", {"seed": seed})
