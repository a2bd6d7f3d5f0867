"""A converted tiny model, a small data set, and the settings of a run on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dydit_cli.artifacts import save_model
from dydit_cli.recipe.schema import FinetuneSection
from tests.objectives.base_models import tiny_model


def write_data(folder: Path, count: int = 60) -> Path:
    """Noisy stripes of three widths."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 3
    stripes = (np.arange(8)[None] // (1 + labels[:, None]) % 2)[:, None, :].repeat(8, axis=1)
    images = (stripes * 200 + random.integers(0, 56, (count, 8, 8))).astype(np.uint8)
    np.savez(folder / "data.npz", images=images, labels=labels)
    return folder / "data.npz"


def settings_for(
    folder: Path, family: str = "dit", fresh_routers: bool = False, **changes: Any
) -> FinetuneSection:
    """Settings of a run in ``folder``; its model and data are written if they are not there.

    Args:
        folder: Where everything lies.
        family: dit or sit.
        fresh_routers: Leave the routers at the paper's start, all on; else they are near even odds, so that
        masks differ.
        changes: Keys of the section.
    """
    if not (folder / f"c-{family}").exists():
        model = tiny_model(family)
        if not fresh_routers:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "_router." in name and name.endswith("bias"):
                        parameter.fill_(0.3)
        save_model(model, folder / f"c-{family}")
        write_data(folder)
    values = {
        "model": str(folder / f"c-{family}"),
        "data": str(folder / "data.npz"),
        "out": str(folder / "t"),
        "steps": 6,
        "batch_size": 8,
        "target_ratio": 0.6,
        "learning_rate": 1e-3,
        "full_width_steps": 1,
        "ramp_steps": 2,
        "ema_decay": 0.9,
        # Many forwards; tests of it ask for it.
        "calibrate": False,
        "log_every": 1,
        "evaluate_every": 2,
        "checkpoint_every": 2,
        "device": "cpu",
    }
    return FinetuneSection.model_validate(values | changes)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without the speed, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.pop("images_per_second") > 0
    return lines
