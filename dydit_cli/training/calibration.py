"""The last correction of a run: one number added to all router logits, so that the realised ratio is the target.

A penalty leaves a rest: where the denoising loss pulls, training settles a little above its target. The rest is small, and so is
the number that removes it. It is found on training samples, so that the held-out ratio stays a measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dydit_cli.data.source import Source
from dydit_cli.dynamic.routers import shift_routers
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.objectives import HeldOutDraws, Objective, RatioReport, measure

IMAGES = 250
LIMIT = 2.0
"""In logits. A run that would need more has not been trained to its target, which no constant replaces."""
TOLERANCE = 1e-3
ATTEMPTS = 8


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        shift: Added to all router logits; 0 if none was needed, or none within reach was enough.
        before: The ratio without it, on the samples that it was found on.
        after: The ratio with it, on the same.
    """

    shift: float
    before: float
    after: float


Measure = Callable[[DynamicModel, HeldOutDraws], RatioReport]


def calibrate(
    model: DynamicModel, source: Source, objective: Objective, target: float, measuring: Measure = measure
) -> Calibration:
    """Find the shift at which ``model`` realises ``target`` on samples of ``source``, and add it to its routers' biases."""
    draws = HeldOutDraws(source, objective, IMAGES)
    dial = model.keep_bias

    def ratio_at(shift: float) -> float:
        return measuring(model.set_keep_bias(dial + shift), draws).ratio

    try:
        found = search(ratio_at, target)
    finally:
        model.set_keep_bias(dial)
    if found.shift:
        shift_routers(model, found.shift)
    return found


def search(ratio_at: Callable[[float], float], target: float) -> Calibration:
    """Find the shift by bisection between 0 and the limit on the side where the target lies.

    Args:
        ratio_at: The ratio at a shift; it grows with it.
        target: What it should be.
    """
    before = ratio_at(0.0)
    if abs(before - target) <= TOLERANCE:
        return Calibration(0.0, before, before)
    near, far = 0.0, LIMIT if before < target else -LIMIT
    after = ratio_at(far)
    if (after - target) * (before - target) > 0:
        return Calibration(0.0, before, before)
    tried = {near: before, far: after}

    def best() -> float:
        # Of equally good shifts the smallest: a ratio of few samples moves in steps.
        return min(tried, key=lambda shift: (abs(tried[shift] - target), abs(shift)))

    for _ in range(ATTEMPTS):
        if abs(tried[best()] - target) <= TOLERANCE:
            break
        middle = (near + far) / 2
        tried[middle] = ratio_at(middle)
        if (tried[middle] - target) * (before - target) > 0:
            near = middle
        else:
            far = middle
    return Calibration(best(), before, tried[best()])
