"""Reading checkpoints of others as data: weights only, never code."""

from __future__ import annotations

from dydit_cli.checkpoints.reading import Checkpoint, open_checkpoint, read_checkpoint

__all__ = ["Checkpoint", "open_checkpoint", "read_checkpoint"]
