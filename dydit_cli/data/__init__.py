"""Training data, images or ready latents: opened from a name or a path, split into training and held-out.

`open_data` is the way in; `Source` is what everything above reads; `TrainingBatches` makes the batch of a
step a pure function of (seed, step).
"""

from __future__ import annotations

from dydit_cli.data.batches import Batch, TrainingBatches
from dydit_cli.data.opening import DataSplit, open_data
from dydit_cli.data.source import Source, Subset

__all__ = ["Batch", "DataSplit", "Source", "Subset", "TrainingBatches", "open_data"]
