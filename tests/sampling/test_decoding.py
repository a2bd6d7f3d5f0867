"""Autoencoders: decoded at their scale, and refused with a reason where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from dydit_cli.errors import DyditError
from dydit_cli.sampling.decoding import makes_pixels, open_vae, vae_config

CPU = torch.device("cpu")


def save_vae(folder: Path, **changes: object) -> AutoencoderKL:
    """A tiny autoencoder that doubles the side."""
    config = {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "sample_size": 16,
        "scaling_factor": 0.5,
    } | changes
    torch.manual_seed(0)
    vae = AutoencoderKL(**config).eval()
    vae.save_pretrained(folder)
    return vae


@pytest.mark.parametrize(("shift", "subtracted"), [(None, 0.0), (0.25, 0.25)])
def test_latents_are_decoded_at_the_autoencoders_scale(
    own_folder: Path, shift: float | None, subtracted: float
) -> None:
    vae = save_vae(own_folder / "vae", shift_factor=shift)
    latents = torch.randn(3, 4, 8, 8)
    decoder = open_vae(own_folder / "vae", 4, CPU)
    with torch.no_grad():
        expected = vae.decode(latents / 0.5 + subtracted).sample
    assert expected.shape == (3, 3, 16, 16)
    torch.testing.assert_close(decoder.decode(latents), expected, rtol=1e-4, atol=1e-5)


def test_a_pipeline_folder_will_do(own_folder: Path) -> None:
    save_vae(own_folder / "pipeline" / "vae")
    assert open_vae(own_folder / "pipeline", 4, CPU).folder == own_folder / "pipeline" / "vae"


def test_pixels_or_latents() -> None:
    assert [channels for channels in range(1, 17) if makes_pixels(channels)] == [1, 3]


class TestMistakes:
    def test_missing_folder(self, own_folder: Path) -> None:
        with pytest.raises(DyditError, match="There is no autoencoder at nowhere"):
            vae_config(Path("nowhere"), 4)

    def test_folder_without_config(self, own_folder: Path) -> None:
        with pytest.raises(DyditError, match=r"It has no config\.json"):
            vae_config(own_folder, 4)

    def test_pixel_models_need_none(self, own_folder: Path) -> None:
        with pytest.raises(DyditError, match="needs no autoencoder"):
            vae_config(own_folder, 1)

    def test_wrong_channels(self, own_folder: Path) -> None:
        save_vae(own_folder / "vae", latent_channels=8)
        with pytest.raises(DyditError, match="does not fit the model") as error:
            vae_config(own_folder / "vae", 4)
        assert "8 channels; the model makes 4" in error.value.why

    def test_something_else(self, own_folder: Path) -> None:
        (own_folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
        with pytest.raises(DyditError, match="is not an autoencoder"):
            vae_config(own_folder, 4)

    @pytest.mark.parametrize("content", ["{", "[1, 2]", "3"])
    def test_damaged_config(self, own_folder: Path, content: str) -> None:
        (own_folder / "config.json").write_text(content)
        with pytest.raises(DyditError, match="damaged"):
            vae_config(own_folder, 4)

    def test_damaged_weights(self, own_folder: Path) -> None:
        save_vae(own_folder / "vae")
        weights = own_folder / "vae" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        with pytest.raises(DyditError, match="cannot be loaded"):
            open_vae(own_folder / "vae", 4, CPU)
