"""The chain of a video model by its real commands: the shipped Latte on garments that drift."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dydit_cli
from dydit_cli.cli.app import main
from dydit_cli.data import open_data
from dydit_cli.families.registry import family_named

GREY_VIDEOS = {
    "sample_size": 32,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 8,
    "num_layers": 1,
    "num_attention_heads": 2,
    "num_classes": 10,
    "num_frames": 8,
}


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    """Run a command with --json and return what it prints."""
    code = main([*(str(word) for word in words), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def few_videos(path: Path) -> Path:
    """Sixty of the shipped set's videos: the commands look at all held-out ones."""
    geometry = family_named("latte").build(GREY_VIDEOS).geometry
    source = open_data("moving-fashion-mnist", geometry=geometry).train
    videos = ((source.batch(list(range(60))) + 1) * 127.5).round().to(torch.uint8)
    np.savez(path, images=videos.movedim(2, -1).numpy(), labels=source.labels[:60].numpy())
    return path


def test_convert_finetune_profile_sample_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted, trained, samples, exported = (tmp_path / name for name in ("c", "t", "s", "e"))
    report = run(capsys, "convert", "--checkpoint", "builtin:latte_fmnist", "--out", converted)
    assert report["family"] == "latte"
    assert report["verification"]["weights"] == 0

    data = few_videos(tmp_path / "videos.npz")
    quick = ["evaluate_every=0", "full_width_steps=0", "ramp_steps=1", "router_learning_rate=0.05"]
    words = ["--data", data, "--target-ratio", "0.5", "--batch-size", "4", "--steps", 3]
    finetuned = run(
        capsys, "finetune", *quick, "ema_decay=0.1", "--model", converted, *words, "--out", trained
    )
    assert 0 < finetuned["ratio"] <= 1

    profile = run(capsys, "profile", "images=8", "--model", trained, "--no-latency", "--out", tmp_path / "p")
    assert profile["counted"]["compact"]["agrees"]
    assert (tmp_path / "p" / "token_maps.png").is_file()

    drawn = run(
        capsys, "sample", "--model", trained, "--num-images", 2, "--steps", 2, "--out", samples,
        "--video-formats", "mp4,gif,frames,grid",
    )  # fmt: skip
    assert drawn["kind"] == "videos"
    assert np.load(samples / "samples.npz")["arr_0"].shape == (2, 8, 32, 32, 3)
    assert {file.name for file in (samples / "videos").iterdir()} >= {"000000.mp4", "000001.gif"}

    run(capsys, "export", "--model", trained, "--format", "diffusers", "--out", exported)
    run(capsys, "export", "--model", trained, "--format", "original", "--out", tmp_path / "o")
    (file,) = (tmp_path / "o").glob("*.pt")
    run(capsys, "convert", "--checkpoint", file, "--num-heads", 8, "--out", tmp_path / "again")
    videos = torch.randn(2, 8, 1, 32, 32)
    with torch.no_grad():
        first, *others = (
            dydit_cli.load_model(folder)(videos, 500, torch.tensor([1, 10])).sample
            for folder in (trained, exported, tmp_path / "again")
        )
    assert all(torch.equal(first, other) for other in others)
