"""`convert` for FLUX: the shipped model, the rankings, and the artifact that the next stages take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dydit_cli.artifacts import load_model
from dydit_cli.conversion.convert import convert
from dydit_cli.conversion.importance.units import read_unit_scores
from dydit_cli.conversion.importance.units_taylor import taylor_units
from dydit_cli.data import open_data
from dydit_cli.errors import DyditError
from dydit_cli.families.original_flux import units_of
from dydit_cli.families.registry import family_named
from dydit_cli.objectives import objective_of
from tests.flux_parts import PIPELINE, prepared, small_flux, write_pictures

SHIPPED = "builtin:flux_fmnist"


def test_the_shipped_model_converts_at_its_own_resolution(tmp_path: Path) -> None:
    report = convert(SHIPPED, out=tmp_path / "c")
    assert report.family == "flux"
    assert (report.geometry["num_tokens"], report.geometry["text_tokens"]) == (49, 7)
    check = report.verification
    assert check.weights == 0
    assert check.dense == 0
    assert check.switched_on == 1
    model = load_model(tmp_path / "c")
    assert model.geometry.num_heads == 4
    assert json.loads((tmp_path / "c" / "importance.json").read_text())["method"] == "magnitude"


def test_rankings_differ_and_scores_can_be_used_again(tmp_path: Path) -> None:
    convert(SHIPPED, out=tmp_path / "random", importance="random", seed=3)
    convert(SHIPPED, out=tmp_path / "again", importance=str(tmp_path / "random"))
    convert(SHIPPED, out=tmp_path / "magnitude")
    orders = [
        {
            key: value
            for key, value in load_model(tmp_path / name).state_dict().items()
            if key.endswith("channel_order")
        }
        for name in ("random", "again", "magnitude")
    ]
    assert all(torch.equal(orders[0][key], orders[1][key]) for key in orders[0])
    assert any(not torch.equal(orders[0][key], orders[2][key]) for key in orders[0])
    with pytest.raises(DyditError, match="no importance ranking"):
        convert(SHIPPED, out=tmp_path / "x", importance="taylr")


def test_taylor_scores_are_the_loss_s_gradient_by_gates(tmp_path: Path) -> None:
    """A unit whose output weights are zero matters nothing; the sum of both streams counts for a shared head."""
    model = small_flux().requires_grad_(False)
    block = model.transformer_blocks[0]
    single = model.single_transformer_blocks[0]
    head_dim = model.geometry.head_dim
    with torch.no_grad():
        for layer in (block.attn.to_out[0], block.attn.to_add_out):
            layer.weight[:, :head_dim] = 0
        block.attn.to_out[0].weight[:, head_dim : 2 * head_dim] = 0
        single.proj_out.weight[:, model.geometry.hidden_size + 5] = 0
    prepared(tmp_path / "cache", data=str(write_pictures(tmp_path / "p", [(8, 8)] * 6)))
    train = open_data(tmp_path / "cache", geometry=model.geometry).train
    found = taylor_units(model, train, objective_of(model), samples=4, batch_size=3)
    config = {**model.config, "mlp_hidden_size": model.geometry.mlp_hidden}
    assert set(found.scores) == {unit.order for unit in units_of(config)}
    heads = found.scores["transformer_blocks.0.attn.head_order"]
    assert float(heads[0]) == 0
    # Nothing of the image stream, but that of the text.
    assert float(heads[1]) > 0
    channels = found.scores["single_transformer_blocks.0.channel_order"]
    assert float(channels[5]) == 0
    assert float(channels[6]) > 0
    whole = taylor_units(model, train, objective_of(model), samples=4, batch_size=4)
    for key, scores in found.scores.items():
        torch.testing.assert_close(whole.scores[key], scores, rtol=1e-4, atol=1e-6)


def test_taylor_by_the_command_s_way(tmp_path: Path) -> None:
    prepared(
        tmp_path / "cache",
        data=str(write_pictures(tmp_path / "p", [(28, 28)] * 6)),
        resolution=28,
        pipeline=PIPELINE,
    )
    report = convert(
        SHIPPED,
        out=tmp_path / "c",
        importance="taylor",
        importance_samples=4,
        data=tmp_path / "cache",
        device="cpu",
    )
    assert report.importance == "taylor"
    source = family_named("flux").model_class.load_config(str(tmp_path / "c"))
    assert read_unit_scores(tmp_path / "c", units_of(source)).details["samples"] == 4
    with pytest.raises(DyditError, match="needs data"):
        convert(SHIPPED, out=tmp_path / "d", importance="taylor")


def test_loras_are_for_flux(tmp_path: Path) -> None:
    with pytest.raises(DyditError, match="cannot be merged"):
        convert("builtin:dit_fmnist", out=tmp_path / "c", lora=["a.safetensors"])
