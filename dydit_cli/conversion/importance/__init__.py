"""Which heads and MLP channels matter: one contract, a ranking is a function from a model to scores."""

from __future__ import annotations

from dydit_cli.conversion.importance.magnitude import magnitude
from dydit_cli.conversion.importance.random import random
from dydit_cli.conversion.importance.scores import Importance, read_importance, write_importance
from dydit_cli.conversion.importance.taylor import taylor

__all__ = ["RANKINGS", "Importance", "magnitude", "random", "read_importance", "taylor", "write_importance"]

RANKINGS = ("magnitude", "taylor", "random")
