"""What a family is trained to predict: Gaussian diffusion (DiT) or a velocity (SiT, FLUX), and what is measured
with it.
"""

from __future__ import annotations

from dydit_cli.objectives.draws import HeldOutBatch, HeldOutDraws
from dydit_cli.objectives.objective import Objective, objective_for, objective_of
from dydit_cli.objectives.realised import RatioReport, held_out_loss, held_out_ratio, measure

__all__ = [
    "HeldOutBatch",
    "HeldOutDraws",
    "Objective",
    "RatioReport",
    "held_out_loss",
    "held_out_ratio",
    "measure",
    "objective_for",
    "objective_of",
]
