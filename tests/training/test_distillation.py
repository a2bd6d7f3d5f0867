"""Self-distillation and weighted ratios in a training step, and a whole run of a tiny FLUX on a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dydit_cli.data import TrainingBatches, open_data
from dydit_cli.dynamic.gates import GumbelGating
from dydit_cli.errors import DyditError
from dydit_cli.families.text_condition import TextCondition
from dydit_cli.flops import executed_ratio
from dydit_cli.objectives import objective_of
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training import fine_tune
from dydit_cli.training import prepare as prepare_run
from dydit_cli.training.step import Denoiser, NoisyBatch, draw, mean_ratio, step_loss
from dydit_cli.training.teacher import FrozenTeacher
from tests.flux_parts import prepared, saved_flux, small_flux, write_pictures


def noisy_batch(model: torch.nn.Module, folder: Path, **changes: object) -> NoisyBatch:
    prepared(folder / "cache", data=str(write_pictures(folder / "pictures", [(8, 8)] * 8)))
    data = open_data(folder / "cache", geometry=model.geometry)  # type: ignore[attr-defined]
    batch = TrainingBatches(data.train, 4, 0, data.mirror).at(0)
    return draw(
        batch,
        objective_of(model),  # type: ignore[arg-type]
        model.geometry,  # type: ignore[attr-defined]
        seed=0,
        step=0,
        label_dropout=0.5,
        device=torch.device("cpu"),
        **changes,  # type: ignore[arg-type]
    )


def loss_of(
    model: torch.nn.Module, noisy: NoisyBatch, teacher: FrozenTeacher | None, dynamic: bool
) -> object:
    return step_loss(
        Denoiser(model),  # type: ignore[arg-type]
        objective_of(model),  # type: ignore[arg-type]
        model.geometry,  # type: ignore[attr-defined]
        noisy,
        dynamic=dynamic,
        complete_branch=False,
        temperature=5.0,
        target=0.5,
        ratio_weight=0.0,
        reduce_mean=lambda value: value,
        teacher=teacher,
    )


def test_the_complete_model_has_nothing_to_learn_from_itself(tmp_path: Path) -> None:
    model = small_flux()
    noisy = noisy_batch(model, tmp_path)
    same = loss_of(model, noisy, FrozenTeacher(model), dynamic=False)
    assert float(same.total) == 0  # type: ignore[attr-defined]
    assert float(same.terms["data"]) > 0  # type: ignore[attr-defined]
    dynamic = loss_of(model, noisy, FrozenTeacher(model), dynamic=True)
    assert float(dynamic.total) > 0  # type: ignore[attr-defined]


def test_the_teacher_does_not_follow_the_model(tmp_path: Path) -> None:
    model = small_flux()
    noisy = noisy_batch(model, tmp_path)
    teacher = FrozenTeacher(model)
    before = teacher.predict(noisy.noisy, noisy.t, noisy.condition)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert torch.equal(teacher.predict(noisy.noisy, noisy.t, noisy.condition), before)
    assert float(loss_of(model, noisy, teacher, dynamic=False).total) > 0  # type: ignore[attr-defined]


def test_guidance_is_drawn_from_1_to_5_for_models_that_take_it(tmp_path: Path) -> None:
    plain = noisy_batch(small_flux(), tmp_path / "a")
    assert isinstance(plain.condition, TextCondition)
    assert plain.condition.guidance is None
    guided = noisy_batch(small_flux(guidance_embeds=True), tmp_path / "b")
    assert isinstance(guided.condition, TextCondition)
    strengths = guided.condition.guidance
    assert strengths is not None
    assert bool(((strengths >= 1) & (strengths < 5)).all())
    assert len(set(strengths.tolist())) == 4


def test_a_weighted_ratio_is_a_mean_of_samples_whose_weights_are_1_on_average(tmp_path: Path) -> None:
    model = small_flux()
    noisy = noisy_batch(model, tmp_path)
    weights = noisy.ratio_weights
    assert weights is not None
    assert float(weights.mean()) == pytest.approx(1)
    assert len(set(weights.tolist())) == 4
    with torch.no_grad():
        gating = GumbelGating(noisy.routing_noise)
        _, routing = model.denoise(noisy.noisy, noisy.t, noisy.condition, gating=gating)
        expected = float((weights * executed_ratio(routing, model.geometry)).mean())
    assert float(mean_ratio(routing, model.geometry, noisy)) == pytest.approx(expected)
    others = noisy_batch(model, tmp_path / "others", reduce_mean=lambda value: 2 * value)
    assert others.ratio_weights is not None
    assert float(others.ratio_weights.mean()) == pytest.approx(0.5), (
        "weights are normalised over all processes"
    )


def settings_of(folder: Path, **changes: object) -> FinetuneSection:
    if not (folder / "model").exists():
        saved_flux(folder / "model", **({"guidance_embeds": True} if changes.pop("guided", False) else {}))
        prepared(folder / "cache", data=str(write_pictures(folder / "pictures", [(8, 8)] * 12)))
    values = {
        "model": str(folder / "model"),
        "data": str(folder / "cache"),
        "out": str(folder / "out"),
        "steps": 4,
        "batch_size": 4,
        "target_ratio": 0.6,
        "full_width_steps": 1,
        "ramp_steps": 1,
        "ema_decay": 0.5,
        "log_every": 1,
        "evaluate_every": 2,
        "checkpoint_every": 2,
        "device": "cpu",
    }
    return FinetuneSection.model_validate(values | changes)


def test_ordered_widths_learn_as_prefixes(tmp_path: Path) -> None:
    """A step's masks are prefixes in both streams, and its gradient reaches every router of widths."""
    model = small_flux(width="ordered")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_router.linear.bias" in name:
                # Half of the units, a logit apart.
                parameter[1:] = 0.5413
                parameter[0] = 2.5
    noisy = noisy_batch(model, tmp_path)
    loss = loss_of(model, noisy, FrozenTeacher(model), dynamic=True)
    loss.total.backward()  # type: ignore[attr-defined]
    routers = {n: p.grad for n, p in model.named_parameters() if "head_router" in n or "channel_router" in n}
    assert len(routers) == 2 * (3 + 2 * 2)
    for name, gradient in routers.items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name


def test_flux_distils_by_default_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    fine_tune(settings_of(tmp_path))
    whole = (tmp_path / "out" / "checkpoints" / "step_0000004" / "model.safetensors").read_bytes()
    fine_tune(settings_of(tmp_path, steps=2, out=str(tmp_path / "parts")))
    fine_tune(settings_of(tmp_path, out=str(tmp_path / "parts"), resume=True))
    parts = (tmp_path / "parts" / "checkpoints" / "step_0000004" / "model.safetensors").read_bytes()
    assert parts == whole


def test_plain_flow_matching_of_a_guided_model_warns(tmp_path: Path) -> None:
    run = prepare_run(settings_of(tmp_path, guided=True, loss="denoising"))
    assert any("damages" in warning for warning in run.warnings)
    assert not prepare_run(settings_of(tmp_path)).warnings


def test_weights_of_noise_levels_belong_to_predicted_noise(tmp_path: Path) -> None:
    from tests.training.runs import settings_for

    runs = [
        prepare_run(settings_for(tmp_path, overwrite=True, learning_rate=1e-30, **given))
        for given in ({}, {"snr_gamma": 5.0})
    ]
    (plain, plain_summary), (weighted, weighted_summary) = (
        (next(iter(run.steps())), run.finish()) for run in runs
    )
    assert weighted.terms["mse"] == plain.terms["mse"]
    assert weighted.terms["denoising"] != plain.terms["denoising"]
    # What is measured is the same whatever was trained on: these two models are equal.
    assert weighted_summary.held_out_loss == plain_summary.held_out_loss
    for settings in (
        settings_for(tmp_path, family="sit", overwrite=True, snr_gamma=5.0),
        settings_of(tmp_path, snr_gamma=5.0),
    ):
        with pytest.raises(DyditError, match="snr_gamma"):
            prepare_run(settings)
    with pytest.raises(ValueError, match="snr_gamma weights the loss 'denoising'"):
        settings_for(tmp_path, snr_gamma=5.0, loss="distillation")


def test_timestep_keys_belong_to_flux(tmp_path: Path) -> None:
    from tests.training.runs import settings_for

    with pytest.raises(DyditError, match="timestep_scale"):
        prepare_run(settings_for(tmp_path, timestep_scale=2.0))
