"""Whole runs on a tiny model: artifact, resume, refusals, and what stays on disk when something goes
wrong.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dydit_cli.artifacts import load_model
from dydit_cli.errors import DyditError
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.objectives import held_out_ratio, objective_for
from dydit_cli.recipe.loading import load_recipe
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training import FineTuning, StepReport, checkpoint, fine_tune, prepare
from tests.training.runs import metrics_of, settings_for


def run(settings: FinetuneSection, stop_after: int | None = None) -> FineTuning:
    """Train, and finish unless stopped."""
    started = prepare(settings)
    for _ in started.steps(should_stop=lambda: started.done == stop_after):
        pass
    if not started.interrupted:
        started.finish()
    return started


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint and of the final weights."""
    newest = checkpoint.checkpoints(folder)[-1].path
    files = [*newest.glob("*.safetensors"), *folder.glob("*.safetensors")]
    assert len(files) == 4
    return {f"{file.name}:{key}": tensor for file in files for key, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, of which other tests only read."""
    folder = tmp_path_factory.mktemp("straight")
    run(settings_for(folder))
    return folder


@pytest.mark.parametrize("stop", ["stopped at step 3", "extended from 3 steps"])
def test_resuming_is_bit_for_bit(straight: Path, tmp_path: Path, stop: str) -> None:
    if stop.startswith("stopped"):
        assert run(settings_for(tmp_path), stop_after=3).interrupted
        assert not (tmp_path / "t" / "config.json").exists()
    else:
        run(settings_for(tmp_path, steps=3))
    torch.manual_seed(12345)  # another process has another global generator
    run(settings_for(tmp_path, resume=True))
    expected, found = tensors_of(straight / "t"), tensors_of(tmp_path / "t")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert metrics_of(straight / "t") == metrics_of(tmp_path / "t")
    assert len({line["trained_ratio"] for line in metrics_of(tmp_path / "t")}) == 6, (
        "masks must have been drawn"
    )


def test_metrics_are_cut_back_to_the_checkpoint(straight: Path, tmp_path: Path) -> None:
    started = prepare(settings_for(tmp_path))
    for report in started.steps():
        if report.step == 3:
            break  # killed: the newest checkpoint is that of step 2
    metrics = tmp_path / "t" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 4, "lo')
    run(settings_for(tmp_path, resume=True))
    assert metrics_of(straight / "t") == metrics_of(tmp_path / "t")


def test_artifact_loads_and_explains_itself(straight: Path) -> None:
    folder = straight / "t"
    settings = settings_for(straight)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["stage"] == "finetune"
    assert manifest["settings"]["steps"] == 6
    assert manifest["results"]["completed"] is True
    assert manifest["results"]["data"]["labels_sha256"]
    recipe = load_recipe(folder / "recipe.yaml", stage="finetune")
    assert recipe.sections["finetune"] == settings
    model = load_model(folder)
    data = prepare(settings.model_copy(update={"out": straight / "other"})).data
    ratio = held_out_ratio(model, data.held_out, objective_for("dit")).ratio
    assert ratio == pytest.approx(manifest["results"]["ratio"], abs=1e-6)
    ema = load_file(checkpoint.checkpoints(folder)[-1].path / "ema.safetensors")
    shift = manifest["results"]["router_shift"]
    for name, tensor in model.state_dict().items():
        last = name.endswith(("_router.linear.bias", "_router.score.bias"))
        assert torch.equal(tensor, ema[name] + shift if last else ema[name]), name


def test_reports_follow_the_cadences(tmp_path: Path) -> None:
    drawn: list[tuple[int, str]] = []

    def sample(model: DynamicTransformer, step: int, path: Path) -> None:
        drawn.append((step, path.name))
        assert path.parent.is_dir()
        assert model.execution == "compact"

    settings = settings_for(tmp_path, sample_every=3, log_every=2, evaluate_every=3, checkpoint_every=4)
    reports: list[StepReport] = list(prepare(settings).steps(on_sample=sample))
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert [report.step for report in reports if report.ema_ratio is not None] == [3, 6]
    assert [report.step for report in reports if report.checkpoint] == [4, 6]
    assert [report.step for report in reports if report.sample] == [3, 6]
    assert drawn == [(3, "step_0000003.png"), (6, "step_0000006.png")]
    assert [line["step"] for line in metrics_of(tmp_path / "t")] == [2, 4, 6]
    assert [report.target for report in reports] == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.6, 0.6])
    assert reports[0].terms.keys() == {"denoising", "mse", "vb", "ratio_loss"}


def test_only_the_newest_checkpoints_are_kept(straight: Path) -> None:
    kept = checkpoint.checkpoints(straight / "t")
    assert [entry.step for entry in kept] == [4, 6]
    assert [entry.path.name for entry in kept] == ["step_0000004", "step_0000006"]


def test_static_control_trains_the_backbone_alone(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, fresh_routers=True, target_ratio=1.0, complete_branch_steps=3)
    started = prepare(settings)
    before = {name: tensor.clone() for name, tensor in started.model.state_dict().items()}
    reports = list(started.steps())
    result = started.finish()
    assert result.ratio == 1.0
    assert [report.trained_ratio for report in reports] == [1.0] * 6
    for name, tensor in started.model.state_dict().items():
        frozen = "_router." in name or name == "pos_embed" or name.endswith("_order")
        assert torch.equal(before[name], tensor) == frozen, name


def test_sit_trains(tmp_path: Path) -> None:
    result = fine_tune(settings_for(tmp_path, "sit", steps=3, mixed_precision="bf16", num_workers=1))
    assert result.steps == 3
    assert load_model(result.out).family == "sit"


def test_ratio_comes_down_to_its_target(tmp_path: Path) -> None:
    """A hundred steps with fast routers: the average's thresholds reach what the schedule asks for."""
    result = fine_tune(
        settings_for(
            tmp_path,
            fresh_routers=True,
            steps=150,
            target_ratio=0.5,
            ramp_steps=60,
            router_learning_rate=0.05,
            ratio_weight=10.0,
            batch_size=16,
            log_every=50,
            evaluate_every=0,
            checkpoint_every=0,
        )
    )
    assert result.ratio == pytest.approx(0.5, abs=0.06)


def test_a_changed_recipe_is_refused_with_its_keys(straight: Path) -> None:
    with pytest.raises(DyditError, match="recipe changed") as caught:
        prepare(settings_for(straight, resume=True, batch_size=4, seed=7))
    assert caught.value.what.endswith("batch_size, seed.")
    assert "batch_size 8 -> 4" in caught.value.why
    assert "seed 0 -> 7" in caught.value.why
    assert str(straight / "t" / "recipe.yaml") in caught.value.fix


def test_cadences_and_places_may_change(straight: Path) -> None:
    settings = settings_for(straight, resume=True, log_every=5, evaluate_every=0, num_workers=1, steps=9)
    resumed = prepare(settings)
    assert resumed.done == 6
    assert not resumed.complete


def test_a_complete_run_says_so_and_keeps_its_result(straight: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (straight / "t").rglob("*")}
    resumed = prepare(settings_for(straight, resume=True))
    assert resumed.complete
    assert list(resumed.steps()) == []
    assert resumed.finish().steps == 6
    assert {path: path.stat().st_mtime_ns for path in (straight / "t").rglob("*")} == before


def test_resume_mistakes(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(DyditError, match="no run to resume"):
        prepare(settings_for(tmp_path, resume=True))
    with pytest.raises(DyditError, match="6 steps already; 4 are asked for"):
        prepare(settings_for(straight, resume=True, steps=4))
    broken = tmp_path / "broken"
    broken.mkdir()
    run(settings_for(broken))
    for entry in checkpoint.checkpoints(broken / "t"):
        for file in entry.path.iterdir():
            file.unlink()
        entry.path.rmdir()
    with pytest.raises(DyditError, match="no checkpoint to resume from"):
        prepare(settings_for(broken, resume=True, steps=9))


def test_changed_data_are_refused_on_resume(tmp_path: Path) -> None:
    run(settings_for(tmp_path), stop_after=2)
    with np.load(tmp_path / "data.npz") as data:
        np.savez(tmp_path / "data.npz", images=data["images"], labels=np.roll(data["labels"], 1))
    with pytest.raises(DyditError, match="changed since the run"):
        prepare(settings_for(tmp_path, resume=True))


def test_an_existing_run_is_not_replaced_by_accident(straight: Path) -> None:
    with pytest.raises(DyditError, match="holds a fine-tuning run already") as caught:
        prepare(settings_for(straight))
    assert "--resume" in caught.value.fix
    with pytest.raises(DyditError, match="holds, the model"):
        prepare(settings_for(straight, out=str(straight / "c-dit"), overwrite=True))
    (straight / "mine").mkdir(exist_ok=True)
    (straight / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DyditError, match="not an artifact of dydit"):
        prepare(settings_for(straight, out=str(straight / "mine"), overwrite=True))


def test_overwrite_starts_afresh(tmp_path: Path) -> None:
    run(settings_for(tmp_path))
    run(settings_for(tmp_path, steps=2, overwrite=True))
    assert [line["step"] for line in metrics_of(tmp_path / "t")] == [1, 2]
    assert [entry.step for entry in checkpoint.checkpoints(tmp_path / "t")] == [2]
    assert load_recipe(tmp_path / "t" / "recipe.yaml", ["resume=true"], "finetune")


def test_a_target_below_the_floor_names_the_floor(tmp_path: Path) -> None:
    with pytest.raises(DyditError, match=r"the floor of this model is 0\.\d+"):
        prepare(settings_for(tmp_path, target_ratio=0.01))
    assert not (tmp_path / "t").exists()


def poisoned(reports: Iterator[StepReport], model: DynamicTransformer, step: int) -> None:
    """Make a weight infinite after ``step``."""
    for report in reports:
        if report.step == step:
            with torch.no_grad():
                model.final_layer.linear.weight[0, 0] = torch.inf


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    started = prepare(settings_for(tmp_path))
    with pytest.raises(DyditError, match=r"became (nan|inf) at step 4") as caught:
        poisoned(started.steps(), started.model, 3)
    assert "step_0000002" in caught.value.fix
    assert [entry.step for entry in checkpoint.checkpoints(tmp_path / "t")] == [2]
    for tensor in load_file(tmp_path / "t" / "checkpoints" / "step_0000002" / "model.safetensors").values():
        assert bool(torch.isfinite(tensor).all())


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    started = prepare(settings)
    with torch.no_grad():
        started.model.final_layer.linear.weight[0, 0] = torch.nan
    with pytest.raises(DyditError, match="there is no checkpoint yet"):
        list(started.steps())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c-dit", "data.npz"]


def test_a_full_disk_leaves_whole_checkpoints_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if path.name == "ema.safetensors" and "0000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DyditError, match="disk is full"):
        list(prepare(settings_for(tmp_path)).steps())
    assert [entry.name for entry in (tmp_path / "t" / "checkpoints").iterdir()] == ["step_0000002"]
    monkeypatch.undo()
    run(settings_for(tmp_path, resume=True))


def test_devices_and_precision(tmp_path: Path) -> None:
    with pytest.raises(DyditError, match="is not a device"):
        prepare(settings_for(tmp_path, device="toaster"))
    with pytest.raises(DyditError, match="'cuda:99' is not there"):
        prepare(settings_for(tmp_path, device="cuda:99"))
    with pytest.raises(DyditError, match="fp16 does not work on a CPU"):
        prepare(settings_for(tmp_path, mixed_precision="fp16"))


def test_clipping_bounds_the_update(tmp_path: Path) -> None:
    reports = list(prepare(settings_for(tmp_path, steps=1, max_grad_norm=0.01)).steps())
    assert reports[0].grad_norm > 0.01, "the norm reported is that before clipping"
    moments = load_file(tmp_path / "t" / "checkpoints" / "step_0000001" / "optimizer.safetensors")
    first = torch.cat([tensor.flatten() for key, tensor in moments.items() if key.endswith(":exp_avg")])
    assert float(first.norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)
