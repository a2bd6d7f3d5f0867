"""diffusers' DiT as a source: the same outputs as diffusers' own class, the same tensors on the way back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor

from dydit_cli.artifacts import load_model, model_config
from dydit_cli.checkpoints import open_checkpoint
from dydit_cli.conversion.convert import convert
from dydit_cli.errors import DyditError
from dydit_cli.export.export import export
from dydit_cli.families.dit_files import layout_of, recognises, to_diffusers
from dydit_cli.families.family import Hints
from dydit_cli.families.registry import family_named
from dydit_cli.inspection.inspect import inspect
from dydit_cli.recipe.schema import ExportSection

DIT = family_named("dit")


def diffusers_dit(seed: int = 0, **changes: Any) -> DiTTransformer2DModel:
    """A small random DiT of diffusers', whose blocks share their embedders as those of every converted original do."""
    config = {
        "num_attention_heads": 6,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    }
    model = DiTTransformer2DModel(**(config | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Samples at timesteps from end to end, and classes with the null class among them."""
    generator = torch.Generator().manual_seed(7)
    samples = torch.randn(4, 4, 8, 8, generator=generator)
    return samples, torch.tensor([1, 100, 500, 999]), torch.tensor([0, 3, 9, 10])


@pytest.mark.parametrize(
    "changes", [{}, {"norm_eps": 1e-6}, {"out_channels": 4}, {"patch_size": 4}, {"sample_size": 16}]
)
def test_the_converted_model_computes_what_diffusers_computes(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = diffusers_dit(**changes)
    model.save_pretrained(tmp_path / "d")
    report = convert(tmp_path / "d", out=tmp_path / "c")
    assert report.family == "dit"
    assert report.source["layout"] == "diffusers"
    samples, times, labels = inputs()
    if "sample_size" in changes:
        samples = samples.repeat(1, 1, 2, 2)
    with torch.no_grad():
        expected = model(samples, timestep=times, class_labels=labels).sample
        for execution in ("static", "dense", "compact"):
            ours = load_model(tmp_path / "c", execution=execution).set_keep_bias(float("inf"))
            found = ours(samples, times, labels).sample
            difference = float((found - expected).abs().max() / expected.abs().max())
            assert difference < 1e-5, execution


def test_without_the_shift_it_would_be_another_function(tmp_path: Path) -> None:
    """The figures of the test above would be worth nothing if the original's frequencies met them as well."""
    model = diffusers_dit()
    model.save_pretrained(tmp_path / "d")
    convert(tmp_path / "d", out=tmp_path / "c")
    ours = load_model(tmp_path / "c", execution="static")
    ours.t_embedder.frequency_shift = 0.0
    samples, times, labels = inputs()
    with torch.no_grad():
        expected = model(samples, timestep=times, class_labels=labels).sample
        found = ours(samples, times, labels).sample
    assert float((found - expected).abs().max() / expected.abs().max()) > 0.1


def test_both_numbers_are_kept_in_the_configuration(tmp_path: Path) -> None:
    diffusers_dit(norm_eps=3e-5).save_pretrained(tmp_path / "d")
    convert(tmp_path / "d", out=tmp_path / "c")
    config = model_config(tmp_path / "c")
    assert (config["frequency_shift"], config["mlp_norm_eps"]) == (1.0, 3e-5)
    assert load_model(tmp_path / "c").blocks[1].norm2.eps == 3e-5


def test_the_static_export_is_the_folder_that_it_came_from(tmp_path: Path) -> None:
    model = diffusers_dit()
    model.save_pretrained(tmp_path / "d")
    convert(tmp_path / "d", out=tmp_path / "c")
    export(ExportSection(model=str(tmp_path / "c"), out=tmp_path / "s", format="static"))
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "s")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {key: again.config[key] for key in ("sample_size", "norm_eps", "num_embeds_ada_norm")} == {
        key: model.config[key] for key in ("sample_size", "norm_eps", "num_embeds_ada_norm")
    }
    assert "DiTTransformer2DModel" in (tmp_path / "s" / "README.md").read_text()


def test_the_original_layout_cannot_hold_it(tmp_path: Path) -> None:
    diffusers_dit().save_pretrained(tmp_path / "d")
    convert(tmp_path / "d", out=tmp_path / "c")
    with pytest.raises(DyditError, match="cannot be written in the original layout"):
        export(ExportSection(model=str(tmp_path / "c"), out=tmp_path / "o", format="original"))
    assert not (tmp_path / "o").exists()


def pipeline_of(transformer: DiTTransformer2DModel) -> DiTPipeline:
    """A whole pipeline with a tiny autoencoder."""
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, sample_size=8).eval()
    return DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())


def test_a_whole_pipeline_and_its_old_class_name(tmp_path: Path) -> None:
    """Repositories from before diffusers 0.29 say Transformer2DModel, and some hold the table of positions."""
    pipeline_of(diffusers_dit()).save_pretrained(tmp_path / "p", safe_serialization=False)
    place = tmp_path / "p" / "transformer"
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    weights = torch.load(place / "diffusion_pytorch_model.bin", weights_only=True)
    torch.save(
        weights | {"pos_embed.pos_embed": torch.zeros(1, 16, 48)}, place / "diffusion_pytorch_model.bin"
    )
    report = convert(tmp_path / "p", out=tmp_path / "c")
    assert report.geometry["num_classes"] == 10
    found = inspect(tmp_path / "p")
    assert found.kind == "pipeline"
    assert found.families == ("dit",)
    assert found.keys is not None
    assert [group.pattern for group in found.keys.lost] == ["pos_embed.pos_embed"]
    assert found.keys.missing == ()


def test_embedders_that_have_diverged_are_refused(tmp_path: Path) -> None:
    model = diffusers_dit()
    with torch.no_grad():
        model.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias[3] += 1e-3
    model.save_pretrained(tmp_path / "d")
    with pytest.raises(DyditError, match="embedders of the blocks differ"):
        convert(tmp_path / "d", out=tmp_path / "c")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation_fn": "geglu"}, "activation_fn"),
        ({"_class_name": "PixArtTransformer2DModel"}, "PixArtTransformer2DModel"),
        ({"norm_type": "ada_norm_single"}, "norm_type"),
    ],
)
def test_other_kinds_of_blocks_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    diffusers_dit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(DyditError, match=said):
        DIT.read(checkpoint.tensors, Hints(config=checkpoint.config))


def test_a_bare_file_says_no_resolution_and_a_foreign_key_is_not_dropped() -> None:
    tensors = diffusers_dit().state_dict()
    with pytest.raises(DyditError, match="resolution"):
        DIT.read(tensors, Hints(num_heads=6))
    extra = tensors | {"transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 48)}
    with pytest.raises(DyditError, match="does not have"):
        DIT.read(extra, Hints(num_heads=6, config={"sample_size": 8}))


def test_the_two_maps_undo_each_other() -> None:
    tensors = diffusers_dit().state_dict()
    source = DIT.read(tensors, Hints(num_heads=6, config={"sample_size": 8}))
    assert recognises(tensors)
    assert layout_of(tensors) == "diffusers"
    assert layout_of(source.tensors) == "original"
    back = to_diffusers(dict(source.tensors))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_the_table_of_positions_is_diffusers() -> None:
    model = diffusers_dit()
    source = DIT.read(model.state_dict(), Hints(num_heads=6, config={"sample_size": 8}))
    assert torch.equal(source.tensors["pos_embed"], model.pos_embed.pos_embed)
