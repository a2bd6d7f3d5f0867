"""Integral control of the ratio: what the realised ratio misses is added up and taken off the target of training.

Training sees masks with noise and weights that still move; what counts are thresholds and averaged weights. The two can differ by
several hundredths for as long as a run lasts. Since the network trains on while the target moves, it adapts to what it will
really have, which a correction at the end cannot give it.
"""

from __future__ import annotations

EVERY = 10
"""Steps between two looks at the realised ratio."""
LARGEST = 0.1


class RatioFeedback:
    """The sum of what was missed.

    Args:
        decay: Of the moving average, whose time constant 1 / (1 - decay) is the control's as well: faster would swing.

    Attributes:
        offset: To be taken off the target; kept in checkpoints.
    """

    def __init__(self, decay: float) -> None:
        self._gain = min(1.0, (1 - decay) * EVERY)
        self.offset = 0.0

    def see(self, realised: float, target: float) -> None:
        """Note a realised ratio."""
        moved = self.offset + self._gain * (realised - target)
        self.offset = max(-LARGEST, min(LARGEST, moved))
