"""`--dry-run` of convert, prepare and export: everything is checked and told, nothing is written, and what is told comes true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dydit_cli.artifacts import load_model
from dydit_cli.cli.app import main
from tests.export.artifacts import exported, trained
from tests.flux_parts import PIPELINE

CONVERT = ["convert", "--checkpoint", "builtin:dit_fmnist", "--out", "my runs/c"]


def weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


def test_convert(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CONVERT, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "builtin:dit_fmnist, 7.52 MB of weights" in out
    assert "6 blocks of 128 channels" in out
    assert "next: dydit convert --checkpoint builtin:dit_fmnist --out 'my runs/c'" in err
    assert not Path("my runs").exists()
    assert main([*CONVERT, "--dry-run", "--json"]) == 0
    seen = told(capsys)
    assert seen["dry_run"] is True
    assert seen["checkpoint"]["params"]["static"] == 1_879_328
    assert not Path("my runs").exists()
    assert main(CONVERT) == 0
    assert seen["writes"]["bytes"] == pytest.approx(weights(Path("my runs/c")), rel=0.02)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--checkpoint", "nowhere.pt"], "There is no checkpoint at nowhere.pt"),
        (["--calibrate", "fashion-mnist-subst"], "did you mean 'fashion-mnist-subset'?"),
        (["--family", "dti"], "did you mean 'dit'?"),
        (["--device", "tpu"], "is not a device"),
    ],
)
def test_what_would_fail_fails(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CONVERT[:1], "--out", "c", "--checkpoint", "builtin:dit_fmnist", *words, "--dry-run"]) == 2
    assert said.lower() in capsys.readouterr().err.lower()
    Path("c").mkdir()
    Path("c/a").touch()
    assert main([*CONVERT[:-1], "c", "--dry-run"]) == 2
    assert "c exists already" in capsys.readouterr().err


def test_convert_counts_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CONVERT, "--calibrate", "fashion-mnist-subset", "--dry-run"]) == 0
    assert "data of the calibration: fashion-mnist-subset, 10,000 samples" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--mirror", "--dtype", "bfloat16"]], ids=["plain", "mirror"])
def test_prepare(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", "--data", "fashion-mnist-subset", "--pipeline", PIPELINE, "--caption", "a {class}"]
    words += ["--resolution", "28", "--limit", "600", "--out", "cache", *more]
    assert main([*words, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "28x28 (600)" in out
    assert "10 distinct" in out
    assert "9,400 pictures are left out" in err
    assert not Path("cache").exists()
    assert main([*words, "--dry-run", "--json"]) == 0
    seen = told(capsys)
    assert main([*words, "--json"]) == 0
    made = told(capsys)
    assert (seen["samples"], seen["texts"]) == (made["samples"], made["texts"])
    assert seen["writes"]["bytes"] == pytest.approx(made["nbytes"], rel=0.05)


def test_prepare_from_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("a sneaker\na bag\n")
    words = ["prepare", "--prompts", "prompts.txt", "--count", "8", "--pipeline", PIPELINE, "--steps", "1"]
    words += ["--resolution", "28", "--out", "cache"]
    assert main([*words, "--dry-run", "--json"]) == 0
    seen = told(capsys)
    assert (seen["kind"], seen["samples"], seen["texts"]) == ("drawings", 8, 2)
    assert not Path("cache").exists()


@pytest.mark.parametrize(
    ("more", "exact"),
    [
        (["--format", "diffusers"], 0.02),
        # Headers of files weigh something in a model as small as this.
        (["--format", "diffusers", "--dtype", "bfloat16"], 0.05),
        (["--format", "static"], 0.1),
    ],
    ids=lambda value: "-".join(value[1::2]) if isinstance(value, list) else "",
)
def test_export(more: list[str], exact: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(tmp_path / "t", in_channels=1)
    words = ["export", "--model", str(model), "--out", "e", *more]
    assert main([*words, "--dry-run"]) == 0
    assert "0.5120 of attention and MLP MACs" in capsys.readouterr().out
    assert main([*words, "--dry-run", "--json"]) == 0
    seen = told(capsys)
    assert not Path("e").exists()
    assert main([*words, "--json"]) == 0
    made = told(capsys)
    written = sum(made["files"][name] for name in made["sha256"])
    assert seen["writes"]["bytes"] == pytest.approx(written, rel=exact)
    assert seen["license"] == made["license"] == "unknown"


def test_export_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(trained(tmp_path / "t", in_channels=1))
    assert main(["export", "--model", model, "--out", "e", "--measured", "nowhere", "--dry-run"]) == 2
    assert "Nothing was measured" in capsys.readouterr().err
    assert main(["export", "--model", model, "--out", model, "--dry-run"]) == 2
    assert "the model that is to be exported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--format", "pruned"], "needs a timestep"),
        (["--format", "static", "--budget", "0.5"], "knows no budget"),
        (["--format", "diffusers", "--budget", "0.5"], "has no budgets"),
        (["--format", "baked", "--sampler", "nosuch"], "sampler 'nosuch'"),
        (["--format", "torch-export", "--vae", "v"], "takes no --vae"),
        (["--pipeline", "p"], "takes no --pipeline"),
        (["--format", "static", "--measured", "p"], "takes no --measured"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_export_refuses_as_it_would(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(trained(tmp_path / "t", in_channels=1))
    assert main(["export", "--model", model, "--out", "e", "--dry-run", *more]) == 2
    assert said in capsys.readouterr().err


def test_export_says_what_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dydit_cli.export.programs.onnx_export.find_spec", lambda name: None)
    model = str(trained(tmp_path / "t", in_channels=1))
    assert main(["export", "--model", model, "--out", "e", "--dry-run", "--format", "onnx"]) == 2
    assert "needs onnx, onnxscript, onnxruntime" in capsys.readouterr().err


def test_export_refuses_what_the_model_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budgets = str(trained(tmp_path / "b", in_channels=1, budgets=[0.3, 0.9]))
    words = ["export", "--out", "e", "--dry-run", "--model"]
    assert main([*words, budgets, "--budget", "0.95"]) == 2
    assert "outside the range" in capsys.readouterr().err
    assert main([*words, budgets, "--budget", "0.5"]) == 0
    timed = str(trained(tmp_path / "l", in_channels=1, td_lora={"rank": 2, "experts": 2}))
    assert main([*words, timed, "--format", "original"]) == 2
    assert "TD-LoRA" in capsys.readouterr().err
    baked = tmp_path / "baked"
    exported(trained(tmp_path / "t", in_channels=1), baked, "baked", steps=3)
    assert main([*words, str(baked)]) == 2
    assert "baked already" in capsys.readouterr().err


def test_integers_are_not_cast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(tmp_path / "t", in_channels=1)
    assert (
        main(["export", "--model", str(model), "--out", "e", "--dtype", "bfloat16", "--dry-run", "--json"])
        == 0
    )
    expected = sum(
        tensor.numel() * (2 if tensor.is_floating_point() else tensor.element_size())
        for tensor in load_model(model).state_dict().values()
    )
    assert told(capsys)["writes"]["bytes"] == expected


def test_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "sample",
        "--model",
        str(trained(tmp_path / "t", in_channels=1)),
        "--num-images",
        "5",
        "--steps",
        "2",
        "--out",
        "s",
    ]
    assert main([*words, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "ddpm, 2 steps, guidance 1.5" in out
    assert "next: dydit sample --model" in err
    assert not Path("s").exists()
    assert main([*words, "--dry-run", "--json"]) == 0
    seen = told(capsys)
    assert (seen["kind"], seen["samples"], seen["batch"]) == ("images", 5, 5)
    assert main(words) == 0
    pictures = [*Path("s/images").glob("*.png"), Path("s/samples.npz")]
    assert 0 < sum(file.stat().st_size for file in pictures) < 2 * seen["writes"]["bytes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classes", "99"], "The model has no class 99"),
        (["--prompt", "a bag"], "The model takes no prompts"),
        (["--budget", "0.5"], "budget"),
        (["--device", "tpu"], "is not a device"),
    ],
)
def test_a_sampling_that_would_fail_fails(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "sample",
                "--model",
                str(trained(tmp_path / "t", in_channels=1)),
                "--out",
                "s",
                *words,
                "--dry-run",
            ]
        )
        == 2
    )
    assert said in capsys.readouterr().err


def test_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "evaluate",
        str(trained(tmp_path / "t", in_channels=1, sample_size=32)),
        "--against",
        "static",
        "--num-images",
        "50",
        "--out",
        "e",
    ]
    assert main([*words, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "50 images drawn" in out
    assert "PSNR and SSIM of pairs" in out
    assert "next: dydit evaluate" in err
    assert main([*words, "--dry-run", "--json"]) == 0
    assert told(capsys)["reference"] == "fashion-mnist"
    assert main([*words, "--reference", "nowhere", "--dry-run"]) == 2
    assert main([*words, "--fail-if", "lpips>1", "--dry-run"]) == 2
    assert not Path("e").exists()
