"""From what a user writes after ``--extractor`` to a network."""

from __future__ import annotations

from pathlib import Path

import torch

from dydit_cli.evaluation.extractors.extractor import Extractor
from dydit_cli.evaluation.extractors.fashion import NAME, open_fashion
from dydit_cli.evaluation.extractors.inception import open_inception


def open_extractor(name: str, resize: str, device: torch.device) -> Extractor:
    """Open ``fashion-mnist``, or the Inception weights' file of that path.

    Raises:
        DyditError: If there is neither.
    """
    if name == NAME:
        return open_fashion(device)
    return open_inception(Path(name).expanduser(), resize, device)
