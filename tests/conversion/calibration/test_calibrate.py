"""Calibrated conversions: what they write, what they are worth untrained, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dydit_cli
from dydit_cli.artifacts import load_model
from dydit_cli.cli.app import app
from dydit_cli.conversion.calibration.calibrate import check_calibration
from dydit_cli.conversion.calibration.rewriting import rewrite_tensors
from dydit_cli.data import open_data
from dydit_cli.errors import DyditError
from dydit_cli.families.family import Source
from dydit_cli.families.registry import family_named
from dydit_cli.objectives import HeldOutDraws, measure, objective_of
from dydit_cli.training.schedule import steps_ahead, target_at
from dydit_cli.training.starting import start_of
from tests.flux_parts import PIPELINE, prepared, write_pictures

DATA = "fashion-mnist-subset"
PARITY = Path(__file__).parent.parent.parent / "parity"
QUICK = {"calibrate": DATA, "calibrate_ratio": 0.9, "calibrate_samples": 32, "calibrate_ranges": 4}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "c"
    dydit_cli.convert("builtin:dit_fmnist", out=folder, **QUICK)
    return folder


def test_the_artifact_says_what_was_done(calibrated: Path) -> None:
    manifest = json.loads((calibrated / "manifest.json").read_text())
    made = manifest["results"]["calibration"]
    assert made["target_ratio"] == 0.9
    assert made["ratio"] == pytest.approx(0.9, abs=0.01)
    assert (made["rounds"], made["samples"], len(made["ranges"])) == (2, 32, 4)
    assert made["loss"] < 1.1 * made["static_loss"]
    assert manifest["settings"]["calibrate_ratio"] == 0.9
    tables = load_file(calibrated / "calibration.safetensors")
    assert tables["blocks.0.head_router.importance"].shape == (4, 8)
    assert (tables["blocks.5.channel_router.kept"][:, 0] == 1).all()
    assert sum(int((table == 0).sum()) for name, table in tables.items() if name.endswith("kept")) > 0


def test_it_runs_at_its_ratio_untrained_and_its_weights_are_the_sources(calibrated: Path) -> None:
    model = load_model(calibrated)
    draws = HeldOutDraws(open_data(DATA, geometry=model.geometry).held_out, objective_of(model), images=50)
    found = measure(model, draws)
    assert found.ratio == pytest.approx(0.9, abs=0.01)
    assert found.tokens == 1
    stored = load_file(calibrated / "diffusion_pytorch_model.safetensors")
    source = torch.load(
        Path(dydit_cli.__file__).parent / "assets" / "models" / "dit_fmnist.pt", weights_only=True
    )
    assert all(torch.equal(stored[key], source[key]) for key in source)


def test_the_same_seed_gives_the_same_routers(calibrated: Path, tmp_path: Path) -> None:
    dydit_cli.convert("builtin:dit_fmnist", out=tmp_path / "again", **QUICK)
    hashes = [
        json.loads((folder / "manifest.json").read_text())["weights_sha256"]
        for folder in (calibrated, tmp_path / "again")
    ]
    assert hashes[0] == hashes[1]


def test_fine_tuning_sets_out_from_the_calibrated_ratio(calibrated: Path, tmp_path: Path) -> None:
    start = start_of(calibrated)
    assert start == pytest.approx(0.9, abs=0.01)
    ahead = steps_ahead(start, 0.5, 10, 100)
    assert ahead == pytest.approx(10 + 20, abs=2)
    assert target_at(ahead, 0.5, 10, 100) == pytest.approx(start, abs=0.01)
    assert steps_ahead(1.0, 0.5, 10, 100) == 0
    assert target_at(steps_ahead(start, 0.95, 10, 100), 0.95, 10, 100) == 0.95
    manifest = json.loads((calibrated / "manifest.json").read_text())
    for stage, results in (("finetune", manifest["results"]), ("convert", {})):
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "stage": stage, "results": results}))
        assert start_of(tmp_path) == 1.0
    assert start_of(tmp_path / "nowhere") == 1.0


def test_ordered_width_is_calibrated_to_prefixes_and_the_command_shows_a_table(tmp_path: Path) -> None:
    source = ["--checkpoint", "builtin:sit_fmnist", "--width", "ordered", "--out", str(tmp_path / "c")]
    asked = [
        "--calibrate",
        DATA,
        "--calibrate-ratio",
        "0.9",
        "--calibrate-samples",
        "32",
        "calibrate_ranges=4",
    ]
    done = CliRunner().invoke(app, ["convert", *source, *asked])
    assert done.exit_code == 0, done.output
    for part in ("Calibrated to 0.9", "MLP groups", "Without any training", "next: dydit finetune"):
        assert part in " ".join(done.output.split())
    model = load_model(tmp_path / "c")
    routing = model.routing(objective_of(model).grid(40))
    assert (routing.heads.diff(dim=2) <= 0).all()
    assert (routing.groups.diff(dim=2) <= 0).all()


def test_flux_is_calibrated_in_the_files_that_were_streamed(tmp_path: Path) -> None:
    cache = prepared(
        tmp_path / "cache",
        data=str(write_pictures(tmp_path / "p", [(28, 28)] * 8)),
        resolution=28,
        pipeline=PIPELINE,
    )
    assert cache is not None
    report = dydit_cli.convert(
        "builtin:flux_fmnist",
        out=tmp_path / "c",
        calibrate=tmp_path / "cache",
        calibrate_ratio=0.95,
        calibrate_samples=8,
        calibrate_ranges=2,
        device="cpu",
    )
    assert report.calibration is not None
    assert report.calibration.ratio == pytest.approx(0.95, abs=0.02)
    model = load_model(tmp_path / "c")
    assert float(model.routing(objective_of(model).grid(10)).groups.mean()) < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibrate_ratio": 0.02}, "width alone reaches"),
        ({"calibrate_ratio": 1.0}, "nothing to calibrate"),
        ({"calibrate": "missing"}, "missing"),
        ({"calibrate_samples": 8, "calibrate_ranges": 4}, "too few for 4 ranges"),
        ({"prune": 0.5}, "pruned model cannot be calibrated"),
        (
            {"checkpoint": PARITY / "dydit_official_tiny" / "checkpoint.pt", "num_heads": 6},
            "routers were trained",
        ),
    ],
)
def test_mistakes_are_explained_and_leave_nothing(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(DyditError, match=message):
        dydit_cli.convert(**{"checkpoint": "builtin:dit_fmnist", **QUICK, **changes}, out=tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_family_without_data_is_refused() -> None:
    with pytest.raises(DyditError, match="--calibrate"):
        check_calibration(family_named("latte-t2v"), Source({}, {}, dynamic=False), None)


def test_tensors_are_replaced_in_their_own_file_and_type(tmp_path: Path) -> None:
    names = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    save_file({"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.ones(2)}, tmp_path / names[0])
    save_file({"c": torch.ones(2)}, tmp_path / names[1])
    untouched = (tmp_path / names[1]).read_bytes()
    rewrite_tensors(tmp_path, {"a": torch.full((2,), 3.0)})
    content = load_file(tmp_path / names[0])
    assert (content["a"].dtype, content["a"].tolist(), content["b"].tolist()) == (
        torch.bfloat16,
        [3.0, 3.0],
        [1.0, 1.0],
    )
    assert (tmp_path / names[1]).read_bytes() == untouched
    with pytest.raises(KeyError):
        rewrite_tensors(tmp_path, {"d": torch.zeros(1)})
