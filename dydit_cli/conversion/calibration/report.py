"""What a calibration says of itself, for the console, the manifest and the artifact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RangeReport:
    """What a range of timesteps keeps, as the routers decide.

    Attributes:
        first: Its least t, in the family's own convention.
        last: Its largest.
        noise_level: In its middle; 1 is pure noise.
        ratio: Of attention and MLP MACs.
        heads: Share of active heads, mean over the blocks.
        groups: Share of active channel groups, the same.
    """

    first: float
    last: float
    noise_level: float
    ratio: float
    heads: float
    groups: float


@dataclass(frozen=True)
class Calibration:
    """What a calibration did.

    Attributes:
        target_ratio: What was asked for.
        ratio: What thresholds realise: MACs of attention and MLP, mean over the timesteps.
        static_loss: Held-out loss of the complete model.
        loss: That of the calibrated one, on the same samples, timesteps and noise.
        held_out_images: How many.
        agreement: Share of the routers' decisions that are those of the table they were fitted to.
        shift: Added to all width logits at last, so that the ratio is met.
        samples: Training samples of a round.
        rounds: How many.
        data: Where they came from.
        ranges: What each range of timesteps keeps, in the order of the sampler's levels.
        seconds: It took.
    """

    target_ratio: float
    ratio: float
    static_loss: float
    loss: float
    held_out_images: int
    agreement: float
    shift: float
    samples: int
    rounds: int
    data: dict[str, Any]
    ranges: tuple[RangeReport, ...]
    seconds: float
