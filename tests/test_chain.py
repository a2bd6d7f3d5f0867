"""The chain that a newcomer follows, by its real commands, from a shipped checkpoint to a pipeline that diffusers runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dydit_cli
from dydit_cli.cli.app import main

STEPS = 3


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    """Run a command with --json and return what it prints."""
    code = main([*(str(word) for word in words), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_convert_finetune_profile_sample_export(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted, trained, samples, exported = (tmp_path / name for name in ("c", "t", "s", "e"))
    run(capsys, "convert", "--checkpoint", f"builtin:{family}_fmnist", "--out", converted)

    words = ["--data", "fashion-mnist-subset", "--target-ratio", "0.5", "--batch-size", "8", "--seed", "0"]
    quick = [
        "log_every=1",
        "evaluate_every=0",
        "full_width_steps=0",
        "ramp_steps=1",
        "router_learning_rate=0.05",
        "ema_decay=0.1",
    ]
    finetuned = run(
        capsys, "finetune", *quick, "--model", converted, *words, "--steps", STEPS, "--out", trained
    )
    assert finetuned["steps"] == STEPS
    assert 0 < finetuned["ratio"] <= 1
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == STEPS

    profile = run(capsys, "profile", "images=50", "--model", trained, "--no-latency", "--out", tmp_path / "p")
    assert profile["static_gmacs"] > 0.08
    assert profile["counted"]["compact"]["agrees"]
    assert {"t", "heads", "groups", "tokens"} <= set(profile["timesteps"][0])
    assert profile["ratio"] == pytest.approx(finetuned["ratio"], abs=0.02)

    drawn = run(
        capsys, "sample", "--model", trained, "--classes", "0,1", "--num-images", 3, "--steps", 2, "--guidance", "1.5",
        "--seed", "0", "--execution", "compact", "--out", samples,
    )  # fmt: skip
    assert drawn["images"] == 3
    assert np.load(samples / "samples.npz")["arr_0"].shape == (3, 32, 32, 3)
    assert len(list((samples / "images").glob("*.png"))) == 3

    run(capsys, "export", "--model", trained, "--format", "diffusers", "--out", exported)
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        [0, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    assert pictures.images.shape[:3] == (2, 32, 32)
    assert np.isfinite(pictures.images).all()


def test_the_static_export_after_convert_is_the_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        capsys,
        "convert",
        "--checkpoint",
        "builtin:dit_fmnist",
        "--importance",
        "random",
        "--out",
        tmp_path / "c",
    )
    run(capsys, "export", "--model", tmp_path / "c", "--format", "static", "--out", tmp_path / "e")
    (file,) = (tmp_path / "e").glob("*.pt")
    source = torch.load(
        Path(dydit_cli.__file__).parent / "assets" / "models" / "dit_fmnist.pt", weights_only=True
    )
    back = torch.load(file, weights_only=True)
    assert back.keys() == source.keys()
    assert all(torch.equal(back[key], source[key]) for key in source)


@pytest.mark.slow
def test_the_demo_ends_at_its_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run(capsys, "demo", "--out", tmp_path / "demo")
    assert summary["models"]["dynamic"]["ratio"] == pytest.approx(summary["target_ratio"], abs=0.02)
    assert summary["models"]["dynamic"]["loss"] < 1.15 * summary["models"]["static"]["loss"]
    assert (tmp_path / "demo" / "comparison.png").exists()
