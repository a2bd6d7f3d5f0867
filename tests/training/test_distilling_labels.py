"""Self-distillation of class-conditional families: a static teacher in place of the data's own targets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dydit_cli.artifacts import load_for_training
from dydit_cli.training.teacher import FrozenTeacher
from tests.training.runs import metrics_of, settings_for
from tests.training.test_finetuning import run

each_family = pytest.mark.parametrize("family", ["dit", "sit"])


@each_family
def test_the_complete_model_has_nothing_to_learn_from_itself(family: str, tmp_path: Path) -> None:
    """With a target of 1 everything is on, so that the loss is 0 and nothing moves."""
    settings = settings_for(tmp_path, family, loss="distillation", target_ratio=1.0, steps=2, log_every=1)
    run(settings)
    lines = metrics_of(tmp_path / "t")
    assert [line["loss"] for line in lines] == [0, 0]
    assert all(line["data"] > 0 for line in lines)


@each_family
def test_a_dynamic_model_learns_from_its_complete_self(family: str, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, family, loss="distillation", steps=3, log_every=1)
    run(settings)
    lines = metrics_of(tmp_path / "t")
    assert all(line["denoising"] > 0 and line["data"] > 0 for line in lines)
    assert all(line["loss"] >= line["denoising"] for line in lines)


@each_family
def test_the_teacher_is_the_static_model_at_the_start(family: str, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, family)
    model = load_for_training(settings.model, torch.device("cpu"))
    sample, labels = model.example_inputs(2, seed=0)
    t = torch.full((2,), 0.5)
    teacher = FrozenTeacher(model)
    with torch.no_grad():
        expected = model.set_execution("static")(sample, t, labels).sample
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert torch.equal(teacher.predict(sample, t, labels), expected)
