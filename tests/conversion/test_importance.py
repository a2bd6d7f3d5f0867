"""Rankings find the units that matter, and their scores can be written and read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dydit_cli.conversion.convert import rank
from dydit_cli.conversion.importance import magnitude, random, read_importance, taylor, write_importance
from dydit_cli.conversion.insertion import set_order
from dydit_cli.conversion.order import order_units
from dydit_cli.data import open_data
from dydit_cli.errors import DyditError
from dydit_cli.execution import StaticExecutor
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.registry import DIT
from dydit_cli.objectives import objective_for
from dydit_cli.randomness import normal

CONFIG = {
    "sample_size": 32,
    "patch_size": 8,
    "in_channels": 1,
    "hidden_size": 24,
    "num_layers": 2,
    "num_attention_heads": 3,
    "num_classes": 10,
}
WEAK_HEAD, WEAK_CHANNEL = 1, 17


@pytest.fixture
def model() -> DynamicTransformer:
    """A model in which one head and one channel of every block write nothing."""
    torch.manual_seed(0)
    model = DIT.build(CONFIG)
    with torch.no_grad():
        for parameter in model.backbone_parameters():
            parameter.normal_(std=0.2)
        for block in model.blocks:
            block.attn.proj.weight.view(24, 3, 8)[:, WEAK_HEAD] = 0
            block.mlp.fc2.weight[:, WEAK_CHANNEL] = 0
    return model.eval()


def test_magnitude_gives_a_unit_that_writes_nothing_no_score(model: DynamicTransformer) -> None:
    scores = magnitude(model)
    assert scores.heads.shape == (2, 3)
    assert scores.channels.shape == (2, 96)
    assert (scores.heads[:, WEAK_HEAD] == 0).all()
    assert (scores.channels[:, WEAK_CHANNEL] == 0).all()
    assert (scores.heads[:, 0] > 0).all()


def test_magnitude_is_the_product_of_norms(model: DynamicTransformer) -> None:
    block = model.blocks[1]
    value = block.attn.qkv.weight[2 * 24 + 16 : 2 * 24 + 24].norm()
    output = block.attn.proj.weight[:, 16:24].norm()
    assert torch.allclose(magnitude(model).heads[1, 2], value * output)


def test_taylor_gives_a_unit_that_writes_nothing_no_score(model: DynamicTransformer) -> None:
    model.requires_grad_(False)
    source = open_data("fashion-mnist-subset", geometry=model.geometry).train
    scores = taylor(model, source, objective_for("dit"), samples=6, batch_size=4)
    assert (scores.heads[:, WEAK_HEAD] == 0).all()
    assert (scores.channels[:, WEAK_CHANNEL] == 0).all()
    assert (scores.heads[:, 0] > 0).all()
    assert scores.details["samples"] == 6


def test_taylor_does_not_depend_on_the_batch_size(model: DynamicTransformer) -> None:
    model.requires_grad_(False)
    source = open_data("fashion-mnist-subset", geometry=model.geometry).train
    one = taylor(model, source, objective_for("dit"), samples=4, batch_size=1)
    four = taylor(model, source, objective_for("dit"), samples=4, batch_size=4)
    assert torch.allclose(one.heads, four.heads, rtol=1e-4)
    assert torch.allclose(one.channels, four.channels, rtol=1e-3, atol=1e-7)


def test_random_is_a_function_of_the_seed(model: DynamicTransformer) -> None:
    assert torch.equal(random(model.geometry, 3).heads, random(model.geometry, 3).heads)
    assert not torch.equal(random(model.geometry, 3).heads, random(model.geometry, 4).heads)


def test_scores_are_written_and_read_again(model: DynamicTransformer, tmp_path: Path) -> None:
    scores = magnitude(model)
    write_importance(tmp_path, scores, order_units(scores.heads, scores.channels, 3, "sorted"))
    for path in (tmp_path, tmp_path / "importance.safetensors"):
        again = read_importance(path, model.geometry)
        assert torch.equal(again.heads, scores.heads)
        assert torch.equal(again.channels, scores.channels)
        assert again.method == "magnitude"


def test_scores_of_another_model_are_refused(model: DynamicTransformer, tmp_path: Path) -> None:
    scores = magnitude(model)
    write_importance(tmp_path, scores, order_units(scores.heads, scores.channels, 3, "sorted"))
    other = DIT.build({**CONFIG, "num_layers": 3})
    with pytest.raises(DyditError, match="another model"):
        read_importance(tmp_path, other.geometry)


def test_an_unknown_ranking_names_the_nearest(model: DynamicTransformer) -> None:
    with pytest.raises(DyditError, match="did you mean 'taylor'"):
        rank(model, "tailor", samples=1, data=None, seed=0, device="cpu", on_progress=lambda *_: None)


def test_an_order_leaves_the_static_model_as_it_is(model: DynamicTransformer) -> None:
    images, times, labels = normal(0, (2, 1, 32, 32)), torch.tensor([10.0, 900.0]), torch.tensor([1, 10])
    with torch.no_grad():
        before, _ = model.denoise(images, times, labels, executor=StaticExecutor())
        scores = magnitude(model)
        set_order(model, order_units(scores.heads, scores.channels, 3, "sorted"))
        after, _ = model.denoise(images, times, labels, executor=StaticExecutor())
    assert torch.equal(before, after)
