"""Fill, Kontext and Control: converted, exported and run by diffusers' own pipelines, they draw what the static model draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

import dydit_cli
from dydit_cli.cli.app import main
from dydit_cli.export.registration import register
from dydit_cli.pipelines.folder import open_pipeline
from tests.export.artifacts import exported
from tests.flux_parts import CONFIG, PIPELINE

LATENT_CHANNELS = 16
SIDE = 32


@dataclass(frozen=True)
class Sibling:
    """A model of FLUX.1-dev's blocks and other inputs, with the channels of the published one.

    Attributes:
        pipeline: Name of diffusers' class.
        in_channels: Of a token.
        inputs: What the pipeline takes beside a prompt.
    """

    pipeline: str
    in_channels: int
    inputs: dict[str, Tensor]


def picture(seed: int) -> Tensor:
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


HOLE = torch.zeros(1, 1, SIDE, SIDE)
HOLE[..., : SIDE // 2] = 1
SIBLINGS = [
    Sibling("FluxFillPipeline", 384, {"image": picture(0), "mask_image": HOLE}),
    Sibling("FluxControlPipeline", 128, {"control_image": picture(1)}),
    Sibling("FluxKontextPipeline", 64, {"image": picture(2)}),
]
each_sibling = pytest.mark.parametrize("sibling", SIBLINGS, ids=[one.pipeline for one in SIBLINGS])


def static_pipeline(sibling: Sibling) -> Any:
    """Small and random throughout; an autoencoder of FLUX's reduction and channels, the shipped text encoders."""
    shipped = open_pipeline(PIPELINE)
    torch.manual_seed(0)
    names = ("sample_size", "text_tokens", "in_channels")
    config = {name: value for name, value in CONFIG.items() if name not in names}
    transformer = FluxTransformer2DModel(
        **config, in_channels=sibling.in_channels, out_channels=64, guidance_embeds=True
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.15)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=LATENT_CHANNELS,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return getattr(diffusers, sibling.pipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(str(shipped.part("scheduler"))),
        vae=vae.eval(),
        text_encoder=CLIPTextModel.from_pretrained(str(shipped.part("text_encoder"))).eval(),
        tokenizer=AutoTokenizer.from_pretrained(str(shipped.part("tokenizer"))),
        text_encoder_2=T5EncoderModel.from_pretrained(str(shipped.part("text_encoder_2"))).eval(),
        tokenizer_2=AutoTokenizer.from_pretrained(str(shipped.part("tokenizer_2"))),
        transformer=transformer.eval(),
    )


def drawn(pipeline: Any, sibling: Sibling) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = (
        {"_auto_resize": False, "max_area": SIDE * SIDE} if sibling.pipeline == "FluxKontextPipeline" else {}
    )
    return pipeline(
        prompt="a sneaker",
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
        max_sequence_length=7,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **sibling.inputs,
        **options,
    ).images


@each_sibling
def test_an_exported_folder_draws_what_the_static_model_draws(sibling: Sibling, tmp_path: Path) -> None:
    register()
    stock = static_pipeline(sibling)
    stock.save_pretrained(str(tmp_path / "stock"))
    expected = drawn(stock, sibling)
    assert expected.shape == (1, 3, SIDE, SIDE)
    dydit_cli.convert(tmp_path / "stock", out=tmp_path / "c")
    report = exported(tmp_path / "c", tmp_path / "e", pipeline=str(tmp_path / "stock"))
    assert report.max_difference == 0.0
    pipeline = getattr(diffusers, sibling.pipeline).from_pretrained(str(tmp_path / "e"))
    assert type(pipeline.transformer).__name__ == "DyFluxTransformer2DModel"
    assert pipeline.transformer.execution == "compact"
    assert float((drawn(pipeline, sibling) - expected).abs().max()) <= 1e-5
    # And the inputs matter, or the pictures would be equal whatever the model did with them.
    name, value = next(iter(sibling.inputs.items()))
    other = Sibling(sibling.pipeline, sibling.in_channels, {**sibling.inputs, name: 1 - value})
    assert float((drawn(pipeline, other) - expected).abs().max()) > 1e-4


def test_dydit_sample_names_the_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock = static_pipeline(SIBLINGS[0])
    stock.transformer.save_pretrained(str(tmp_path / "stock"))
    dydit_cli.convert(tmp_path / "stock", out=tmp_path / "c")
    assert main(["sample", "--model", str(tmp_path / "c"), "--prompt", "a sneaker", "--out", "s"]) == 2
    assert "FluxFillPipeline" in capsys.readouterr().err
