"""`dydit evaluate` and `dydit compare` as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dydit_cli.cli.app import main
from tests.evaluation.sources import archive, image_folder, pictures, saved_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved_model(tmp_path / "t")


def words(*more: str) -> list[str]:
    archive(Path("r.npz"), pictures(20, 9, 32, 1))
    options = [
        "--reference",
        "r.npz",
        "--num-images",
        "8",
        "--steps",
        "2",
        "--sampler",
        "ddim",
        "--device",
        "cpu",
    ]
    return ["evaluate", *more, *options]


def test_a_model_from_plain_options(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(str(model), "--seed", "3", "--out", "e")) == 0
    captured = capsys.readouterr()
    for expected in (
        "ddim, 2 steps, guidance 1.5, seed 3",
        "Fréchet distance",
        "class accuracy",
        "MMACs",
        "sha256",
    ):
        assert expected in captured.out
    assert "Written to e: evaluation.json" in captured.out
    assert sorted(path.name for path in Path("e").iterdir()) == [
        "evaluation.json",
        "manifest.json",
        "recipe.yaml",
    ]
    assert main(["evaluate", "e/recipe.yaml", "out=again"]) == 0
    first, second = (json.loads(Path(f"{name}/evaluation.json").read_text()) for name in ("e", "again"))
    assert first["metrics"] == second["metrics"]


def test_a_reference_as_an_override(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An archive that is the value of a key is not what is to be evaluated."""
    archive(Path("r.npz"), pictures(20, 9, 32, 1))
    assert main(["evaluate", str(model), "reference=r.npz", "num_images=8", "steps=2", "sampler=ddim"]) == 0
    assert "Fréchet distance" in capsys.readouterr().out


def test_json_alone_on_stdout(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("--model", str(model), "--json")) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 8


def test_a_gate_for_pipelines_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    """No model of ours, no network, no reference: two folders of images and a condition."""
    image_folder(Path("dynamic"), pictures(3, 1, 16))
    image_folder(Path("static"), pictures(3, 2, 16))
    gate = ["evaluate", "dynamic", "--against", "static", "--fail-if"]
    assert main([*gate, "psnr<1"]) == 0
    assert main([*gate, "psnr<25", "--fail-if", "ssim<-1"]) == 1
    captured = capsys.readouterr()
    assert "failed: psnr.mean is" in captured.err
    assert "the condition is psnr<25" in captured.err
    assert "ssim<" not in captured.err
    assert "Traceback" not in captured.err
    assert main([*gate, "lpips>0.3"]) == 2
    assert "cannot be judged" in capsys.readouterr().err


def test_pairs_and_sheets(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(str(model), "--against", "static", "--yardstick-images", "2", "--out", "e")) == 0
    captured = capsys.readouterr()
    assert "yardstick: another seed" in captured.out
    assert "yardstick: static in bfloat16" in captured.out
    assert Path("e/worst_pairs.png").is_file()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--extractor", "nowhere.pth"), "pt_inception-2015-12-05-6726825d.pth"),
        (("--reference", "nowhere"), "nothing to evaluate at nowhere"),
        (("--fail-if", "psrn<3"), "did you mean 'psnr'"),
        (("--resize", "area"), "evaluate.resize"),
        (("--stepz", "3"), "did you mean '--steps'"),
    ],
)
def test_mistakes_have_three_parts(
    model: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], expected: str
) -> None:
    assert main(["evaluate", str(model), "--device", "cpu", *more]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "  why: " in captured.err
    assert captured.out == ""


def test_nothing_or_too_much_to_evaluate(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate"]) == 2
    assert "needs a model folder, or samples" in capsys.readouterr().err
    assert main(["evaluate", str(model), "--samples", "x.npz"]) == 2
    assert "More than one thing" in capsys.readouterr().err


def test_compare(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, more in (("dynamic", ()), ("static", ("--execution", "static"))):
        assert main(words(str(model), *more, "--out", name)) == 0
    capsys.readouterr()
    assert main(["compare", "dynamic", "static"]) == 0
    captured = capsys.readouterr()
    assert "Fréchet ↓" in captured.out
    assert "±" in captured.out
    assert "half of the 95 % interval" in captured.err
    for kind, first in (("csv", "run,sampling"), ("markdown", "| run |"), ("latex", "\\begin{tabular}")):
        assert main(["compare", "dynamic", "static", "--format", kind]) == 0
        assert capsys.readouterr().out.startswith(first)
    assert main(["compare", "nowhere"]) == 2
    assert main(["compare", "dynamic", "--format", "html"]) == 2
