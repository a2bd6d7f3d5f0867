"""Which heads and MLP channels matter: one contract, a ranking is a function from a model to scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dydit_cli.conversion.importance.magnitude import magnitude
from dydit_cli.conversion.importance.random import random
from dydit_cli.conversion.importance.scores import Importance, read_importance, write_importance
from dydit_cli.conversion.importance.taylor import taylor
from dydit_cli.families.dynamic_model import DynamicModel

__all__ = [
    "PLUGGED_RANKINGS",
    "RANKINGS",
    "Importance",
    "Ranking",
    "RankingRequest",
    "magnitude",
    "random",
    "read_importance",
    "taylor",
    "write_importance",
]

RANKINGS = ("magnitude", "taylor", "random")
"""Those of the package."""


@dataclass(frozen=True)
class RankingRequest:
    """What a plug-in's ranking is told beside the model.

    Attributes:
        data: Training data, as given; None if none was.
        samples: How many to use.
        seed: Of every draw.
        device: Where to run, as given.
    """

    data: str | Path | None
    samples: int
    seed: int
    device: str


Ranking = Callable[[DynamicModel, RankingRequest], Importance]
"""From a model with its static weights, in fp32, to scores by stored head and channel: larger is more important."""

PLUGGED_RANKINGS: dict[str, Ranking] = {}
"""Those of plug-ins, by name."""
