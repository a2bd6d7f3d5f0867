"""Blocks compiled for real, with a step cache that decides whether they run, and with int8 weights."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from torch import Tensor

from dydit_cli.families.dynamic_model import DynamicModel
from tests.composition.test_caches import ALWAYS, steps_of
from tests.composition.test_quantised import quantised
from tests.tiny import relative_difference, tiny_model

pytestmark = pytest.mark.slow


@torch.no_grad()
def predictions(model: DynamicModel) -> list[Tensor]:
    """Of a run whose later steps the first answers, and of one without a cache."""
    steps = steps_of(model)
    plain = [model.denoise(*step)[0] for step in steps]
    model.enable_cache(FirstBlockCacheConfig(threshold=ALWAYS))
    model.begin_run()
    cached = [model.denoise(*step)[0] for step in steps]
    model.disable_cache()
    return plain + cached


@pytest.mark.parametrize("execution", ["compact", "static"])
@pytest.mark.parametrize("in_int8", [False, True], ids=["fp32", "int8"])
def test_all_together(execution: str, in_int8: bool) -> None:
    if in_int8:
        pytest.importorskip("torchao.quantization")
    model = tiny_model("dit")
    if in_int8:
        quantised(model)
    expected = predictions(model.set_execution(execution))
    found = predictions(model.set_execution(execution, compile=True))
    for compiled, eager in zip(found, expected, strict=True):
        assert relative_difference(compiled, eager) < 1e-4
