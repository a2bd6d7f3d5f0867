"""Fine-tuning a model of videos: losses over frames, a run, and the same run stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dydit_cli
from dydit_cli.artifacts import load_model, save_model
from dydit_cli.cli.app import main
from dydit_cli.objectives import objective_for
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training import fine_tune
from tests.tiny import bits, tiny_model
from tests.training.runs import metrics_of


def test_losses_of_a_video_are_the_means_over_its_frames() -> None:
    """The same noise level for all frames, the channels on axis 2, squared error and variational bound alike."""
    objective = objective_for("latte")
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.rand(3, 4, 2, 8, 8, generator=generator) * 2 - 1 for _ in range(2))
    prediction = torch.randn(3, 4, 4, 8, 8, generator=generator)
    t = torch.tensor([0.0, 400.0, 999.0])
    whole = objective.losses(prediction, clean, noise, t)
    frames = objective.losses(
        prediction.flatten(0, 1), clean.flatten(0, 1), noise.flatten(0, 1), t.repeat_interleave(4)
    )
    assert set(whole) == {"loss", "mse", "vb"}
    for name, values in whole.items():
        torch.testing.assert_close(values, frames[name].view(3, 4).mean(dim=1))
    mixed = objective.noised(clean, noise, t)
    assert torch.equal(mixed[:, 1], objective.noised(clean[:, 1], noise[:, 1], t))


def settings(folder: Path, name: str = "t", **changes: Any) -> FinetuneSection:
    """A short run on videos of moving stripes; model and data are written if they are not there."""
    if not (folder / "c").exists():
        save_model(tiny_model("latte", in_channels=1, num_classes=3), folder / "c")
        random = np.random.default_rng(0)
        labels = np.arange(48) % 3
        stripes = (np.arange(8)[None] // (1 + labels[:, None]) % 2)[:, None, :].repeat(8, axis=1)
        videos = np.stack([np.roll(stripes, frame, axis=2) for frame in range(2)], axis=1)
        videos = (videos * 200 + random.integers(0, 56, videos.shape)).astype(np.uint8)
        np.savez(folder / "data.npz", images=videos[..., None], labels=labels)
    values = {
        "model": str(folder / "c"),
        "data": str(folder / "data.npz"),
        "out": str(folder / name),
        "steps": 4,
        "batch_size": 4,
        "target_ratio": 0.6,
        "full_width_steps": 1,
        "ramp_steps": 2,
        "log_every": 1,
        "evaluate_every": 2,
        "checkpoint_every": 2,
        "device": "cpu",
    }
    return FinetuneSection.model_validate(values | changes)


def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path) -> None:
    result = fine_tune(settings(tmp_path))
    assert 0 < result.ratio < 1
    fine_tune(settings(tmp_path, "stopped", steps=2))
    fine_tune(settings(tmp_path, "stopped", resume=True))
    first, second = (load_model(tmp_path / name).state_dict() for name in ("t", "stopped"))
    assert all(torch.equal(bits(first[key]), bits(second[key])) for key in first)
    assert len(metrics_of(tmp_path / "t")) == 4
    # The tables of places and frames do not train.
    start = load_model(tmp_path / "c").state_dict()
    for table in ("pos_embed", "temp_embed"):
        assert torch.equal(first[table], start[table])
    assert not torch.equal(first["blocks.1.attn.qkv.weight"], start["blocks.1.attn.qkv.weight"])


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    results = [
        fine_tune(settings(tmp_path, name, gradient_checkpointing=name == "saving"))
        for name in ("t", "saving")
    ]
    first, second = (load_model(tmp_path / name).state_dict() for name in ("t", "saving"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert results[0].ratio == results[1].ratio


def test_sample_grids_are_sheets_of_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings(tmp_path)
    words = ["--model", tmp_path / "c", "--data", tmp_path / "data.npz", "--out", tmp_path / "t"]
    options = ["--steps", "2", "--batch-size", "4", "--sample-every", "2", "--device", "cpu"]
    assert main(["finetune", *map(str, words), *options]) == 0
    assert capsys.readouterr()
    with Image.open(tmp_path / "t" / "samples" / "step_0000002.png") as sheet:
        # 16 videos of 2 frames: a row a video.
        assert sheet.height > 4 * sheet.width


def test_an_unconditional_model_trains(tmp_path: Path) -> None:
    settings(tmp_path)
    save_model(tiny_model("latte", in_channels=1, num_classes=0), tmp_path / "u")
    result = fine_tune(settings(tmp_path, model=str(tmp_path / "u"), steps=2))
    assert result.steps == 2


def test_taylor_ranking_of_videos(tmp_path: Path) -> None:
    """Scores from data, for both kinds of block."""
    settings(tmp_path)
    model = load_model(tmp_path / "c")
    static = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if "_router." not in key and "_order" not in key
    }
    torch.save({"ema": static}, tmp_path / "static.pt")
    report = dydit_cli.convert(
        tmp_path / "static.pt",
        out=tmp_path / "ranked",
        num_heads=6,
        importance="taylor",
        importance_samples=8,
        data=tmp_path / "data.npz",
    )
    assert report.family == "latte"
    assert report.verification.dense == 0
    assert report.source["copy"] == "ema"
    orders = [block.attn.head_order.tolist() for block in load_model(tmp_path / "ranked").dynamic_blocks]
    assert any(order != sorted(order) for order in orders)
