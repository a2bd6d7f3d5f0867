"""What a plan says against what a run really takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dydit_cli.artifacts import model_config
from dydit_cli.dynamic.gates import GumbelGating, RoutingNoise
from dydit_cli.families.registry import family_named, preset_named
from dydit_cli.training import pace, prepare
from dydit_cli.training.checkpoint import checkpoints
from dydit_cli.training.pace import pace_of
from dydit_cli.training.planning import plan_run
from tests.training.runs import settings_for
from tests.training.test_finetuning import run


def test_sizes_are_those_of_a_real_run(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, keep_checkpoints=1)
    plan = plan_run(settings, family_named("dit"), model_config(settings.model))
    done = run(settings)
    trained = [parameter for parameter in done.model.parameters() if parameter.requires_grad]
    assert plan.parameters.trained == sum(parameter.numel() for parameter in trained)
    routers = sum(parameter.numel() for parameter in done.model.router_parameters())
    assert plan.parameters.routers == routers
    assert plan.memory.weights == sum(tensor.nbytes for tensor in done.model.state_dict().values())
    assert plan.memory.gradients == sum(parameter.nbytes for parameter in trained)
    (newest,) = checkpoints(tmp_path / "t")
    written = sum(file.stat().st_size for file in newest.path.glob("*.safetensors"))
    assert written == pytest.approx(plan.disk.checkpoint, rel=0.1), "headers are a part of so small a file"
    assert plan.disk.kept == 2


def test_activations_are_what_autograd_keeps(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, batch_size=8)
    plan = plan_run(settings, family_named("dit"), model_config(settings.model))
    model = prepare(settings).model
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    sample, condition = model.example_inputs(8, 0)
    noise = RoutingNoise.draw(model.geometry, 0, 0, range(8), torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.denoise(sample, torch.full((8,), 0.5), condition, gating=GumbelGating(noise, 5.0, 1.0, None))
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert plan.memory.activations == pytest.approx(real, rel=0.02)


def test_recomputing_and_parts_save_memory(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, batch_size=8)
    config = model_config(settings.model)

    def activations(**changes: object) -> int:
        changed = settings.model_copy(update=changes)
        return plan_run(changed, family_named("dit"), config).memory.activations

    whole = activations()
    assert activations(accumulate=2) == pytest.approx(whole / 2, rel=0.1)
    assert activations(gradient_checkpointing=True) < 0.7 * whole
    assert activations(complete_branch_steps=1) > 1.5 * whole


def test_a_large_model_is_estimated_and_says_so() -> None:
    family, config = preset_named("dit-xl/2")
    settings = settings_like(batch_size=256, steps=100)
    plan = plan_run(settings, family, config)
    assert plan.work.forward == pytest.approx(118.6887e9, rel=1e-4)
    assert plan.memory.weights / 4 == pytest.approx(678e6, rel=0.01)
    found = pace_of(settings, plan, family, config, None, torch.device("cpu"), measure=False)
    assert found.how == "estimated"
    assert found.why == "measuring was not asked for"
    assert found.total_s > 100


def test_small_batches_stand_for_a_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path, batch_size=64, complete_branch_steps=2, complete_branch_every=2)
    config = model_config(settings.model)
    plan = plan_run(settings, family_named("dit"), config)
    assert plan.work.complete_steps == 1
    arguments = (settings, plan, family_named("dit"), config, None, torch.device("cpu"))
    monkeypatch.setattr(pace, "_product_speed", lambda device, precision: plan.work.step * 2 / 60)
    found = pace_of(*arguments)
    assert found.how == "extrapolated"
    assert found.batch < 64
    assert found.complete_step_s > 0


def settings_like(**changes: object):
    from dydit_cli.recipe.schema import FinetuneSection

    return FinetuneSection.model_validate({"model": "m", "data": "d", "out": "o", **changes})


def test_adapters_train_a_small_share_and_hold_the_rest_once() -> None:
    family, config = preset_named("dit-xl/2")
    plan = plan_run(settings_like(method="td-lora", batch_size=4, steps=100), family, config)
    assert plan.parameters.share < 0.015
    assert plan.parameters.trained == pytest.approx(0.0137 * plan.parameters.static, rel=0.03)
    whole = 4 * (plan.parameters.static + plan.parameters.routers)
    assert plan.memory.weights == pytest.approx(whole, rel=0.02)
    assert plan.memory.average < 0.02 * whole
    assert plan.disk.checkpoint < 0.1 * whole
    assert plan.memory.teacher == 0


@pytest.mark.parametrize(
    ("changes", "free", "why"),
    [
        ({}, 1_000, "do not fit into"),
        ({"processes": 2, "sharding": "fsdp2"}, 10**12, "sharded"),
        ({}, None, ""),
    ],
)
def test_why_nothing_can_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], free: int | None, why: str
) -> None:
    settings = settings_for(tmp_path, **changes)
    config = model_config(settings.model)
    monkeypatch.setattr(pace, "free_memory", lambda device: free)
    plan = plan_run(settings, family_named("dit"), config)
    found = pace_of(settings, plan, family_named("dit"), config, None, torch.device("cpu"))
    assert why in found.why
    assert found.how == ("estimated" if why else "measured")


def test_a_batch_that_does_not_fit_is_extrapolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path, batch_size=64)
    config = model_config(settings.model)
    plan = plan_run(settings, family_named("dit"), config)
    fixed = plan.memory.total - plan.memory.activations
    monkeypatch.setattr(
        pace, "free_memory", lambda device: int((fixed + plan.memory.activations / 8) / pace.ROOM)
    )
    found = pace_of(settings, plan, family_named("dit"), config, None, torch.device("cpu"))
    assert found.how == "extrapolated"
    assert found.batch == 8
    assert "does not fit into memory; steps of 4 and 8 were measured" in found.why
