"""The sections refuse what could not run, and are complete as Python objects."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dydit_cli.recipe.schema import (
    SECTIONS,
    ConvertSection,
    ExportSection,
    FinetuneSection,
    ProfileSection,
    SampleSection,
)


def finetune(**changes: Any) -> FinetuneSection:
    return FinetuneSection(**{"model": "c", "data": "d", "out": "t", "steps": 10, **changes})


def test_the_stages_follow_each_other() -> None:
    assert list(SECTIONS) == ["prepare", "convert", "finetune", "profile", "sample", "evaluate", "export"]
    for stage, section in SECTIONS.items():
        assert set(section.parents) <= set(list(SECTIONS)[: list(SECTIONS).index(stage)])


def test_the_papers_values_are_the_defaults() -> None:
    section = finetune()
    assert (section.target_ratio, section.ratio_weight, section.temperature) == (0.5, 1.0, 5.0)
    assert (section.full_width_steps, section.ramp_steps, section.complete_branch_steps) == (100, 1000, 0)
    assert (section.learning_rate, section.weight_decay, section.ema_decay) == (1e-4, 0.0, 0.9999)
    assert section.label_dropout == 0.1
    assert SampleSection(model="t", out="s").guidance_channels == "original"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_ratio": 0},
        {"target_ratio": 1.01},
        {"target_ratio": math.nan},
        {"steps": 0},
        {"steps": True},
        {"batch_size": -1},
        {"seed": -1},
        {"learning_rate": 0},
        {"learning_rate": math.inf},
        {"temperature": 0},
        {"ema_decay": 1},
        {"label_dropout": 1.0},
        {"full_width_steps": -1},
        {"mixed_precision": "fp8"},
        {"keep_checkpoints": 0},
        {"out": ""},
        {"resume": True, "overwrite": True},
        {"stpes": 3},
    ],
)
def test_what_finetune_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        finetune(**changes)


def test_taylor_importance_needs_data() -> None:
    with pytest.raises(ValidationError, match="give data"):
        ConvertSection(checkpoint="a.pt", out="c", importance="taylor")
    assert ConvertSection(checkpoint="a.pt", out="c", importance="taylor", data="d").data == "d"


@pytest.mark.parametrize("given", [{}, {"model": "t", "preset": "dit-xl/2"}])
def test_profile_takes_one_of_model_and_preset(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="either a model folder or a preset"):
        ProfileSection(**given)
    assert ProfileSection(preset="dit-xl/2").model is None


def test_the_dial_reaches_the_complete_model_but_not_nothing() -> None:
    assert SampleSection(model="t", out="s", keep_bias="inf").keep_bias == math.inf
    with pytest.raises(ValidationError, match="switches every unit off"):
        SampleSection(model="t", out="s", keep_bias="-inf")


def test_formats_of_videos_are_a_list_of_known_names() -> None:
    section = SampleSection(model="t", out="s", video_formats="frames,mp4", fps="12.5")
    assert section.video_formats == ("frames", "mp4")
    assert SampleSection(**section.model_dump(mode="json")) == section
    for wrong in ({"video_formats": "gfi"}, {"video_formats": ""}, {"fps": 0}, {"fps": "inf"}):
        with pytest.raises(ValidationError):
            SampleSection(model="t", out="s", **wrong)


def test_sections_are_frozen_and_paths_are_paths() -> None:
    section = ExportSection(model=Path("t"), out="e")
    assert section.model == "t"
    assert section.out == Path("e")
    with pytest.raises(ValidationError):
        section.format = "static"


def test_a_section_survives_its_own_json() -> None:
    section = finetune(mirror="5,7", router_learning_rate="1e-3")
    assert FinetuneSection(**section.model_dump(mode="json")) == section
