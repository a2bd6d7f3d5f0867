"""The published models, as far as they can be checked without their weights: shapes, parameters, MACs and schedule at full size."""

from __future__ import annotations

import pytest
import torch

from dydit_cli.families.registry import preset_named
from dydit_cli.flops import macs_of
from dydit_cli.recipe.builtin import builtin_recipes
from dydit_cli.recipe.loading import load_recipe
from dydit_cli.recipe.schema import ConvertSection, EvaluateSection
from dydit_cli.sampling.diffusion import spaced_timesteps

NAMES = [recipe.name for recipe in builtin_recipes() if recipe.name.startswith("verify/")]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_asks_for_what_was_published(name: str) -> None:
    recipe = load_recipe(name)
    convert, evaluate = recipe.get(ConvertSection), recipe.get(EvaluateSection)
    assert convert is not None
    assert evaluate is not None
    assert (evaluate.num_images, evaluate.steps, evaluate.guidance) == (50_000, 250, 1.5)
    assert evaluate.sampler == ("sde" if convert.family == "sit" else "ddpm")
    assert evaluate.execution == ("compact" if "dydit" in name else "static")
    assert evaluate.guidance_channels == "first3"


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_the_model_has_the_published_size(family: str) -> None:
    found, config = preset_named(f"{family}-xl/2")
    with torch.device("meta"):
        model = found.model_class(**config)
    static = {name: tensor for name, tensor in model.named_parameters() if "_router." not in name}
    # The original's 675,129,632, position table included.
    assert sum(tensor.numel() for tensor in static.values()) == 675_129_632
    assert static["blocks.27.attn.qkv.weight"].shape == (3456, 1152)
    assert static["final_layer.linear.weight"].shape == (2 * 2 * 8, 1152)
    assert macs_of(model.geometry).total / 1e9 == pytest.approx(118.69, abs=0.005)


def test_the_schedule_is_that_of_the_paper() -> None:
    times = spaced_timesteps(250)
    assert (len(times), int(times[0]), int(times[-1])) == (250, 999, 0)
    assert bool((times.diff() < 0).all())
