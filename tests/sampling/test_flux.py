"""Sampling FLUX: the picture of diffusers' own pipeline, from prompts or from a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dydit_cli.errors import DyditError
from dydit_cli.pipelines.folder import open_pipeline
from dydit_cli.pipelines.text import TextEncoders
from dydit_cli.randomness import generator
from dydit_cli.sampling.generate import generate
from dydit_cli.sampling.rectified import times
from dydit_cli.sampling.run import sample
from dydit_cli.sampling.samplers import sampler_for
from tests.flux_parts import PIPELINE, prepared, saved_flux, small_flux, stock_pipeline, write_pictures

CPU = torch.device("cpu")


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_draws_the_latents_of_the_stock_pipeline(tmp_path: Path, guided: bool, size: tuple[int, int]) -> None:
    pipe = stock_pipeline(tmp_path / "pipeline", guidance_embeds=guided)
    folder = open_pipeline(tmp_path / "pipeline")
    prompts = ["a sneaker", "a photo of a coat"]
    encoded = TextEncoders(folder, CPU).encode(prompts)
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt(prompts, max_sequence_length=7)
    torch.testing.assert_close(encoded.prompt_embeds, embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoded.pooled, pooled, rtol=0, atol=1e-6)
    conditions = type(encoded)(embeds, pooled, torch.full((2,), 2.5) if guided else None)
    model = small_flux(guidance_embeds=guided).set_execution("static")
    height, width = size
    (batch,) = generate(
        model,
        num_images=2,
        steps=3,
        seed=5,
        conditions=conditions,
        size=size,
        schedule=folder.config("scheduler", "scheduler_config.json"),
    )
    noise = torch.stack(
        [torch.randn(4, height, width, generator=generator(5, "start", index)) for index in (0, 1)]
    )
    theirs = pipe(
        prompt=prompts,
        height=2 * height,
        width=2 * width,
        num_inference_steps=3,
        guidance_scale=2.5,
        max_sequence_length=7,
        latents=pipe._pack_latents(noise, 2, 4, height, width),
        output_type="latent",
    ).images
    expected = pipe._unpack_latents(theirs, 2 * height, 2 * width, pipe.vae_scale_factor)
    torch.testing.assert_close(batch.samples, expected, rtol=0, atol=2e-5)


def test_compact_equals_dense_and_the_plan_is_met() -> None:
    model = small_flux()
    _, conditions = model.example_inputs(2, 0)
    dense, compact = (
        next(generate(model.set_execution(name), num_images=3, steps=4, conditions=conditions)).samples
        for name in ("dense", "compact")
    )
    torch.testing.assert_close(compact, dense, rtol=0, atol=1e-4)
    plan = model.current_plan
    assert plan is not None
    assert plan.misses == 0


def test_an_image_depends_on_the_seed_and_its_number_alone() -> None:
    model = small_flux()
    _, conditions = model.example_inputs(2, 0)
    settings = {"num_images": 4, "steps": 2, "conditions": conditions}
    whole = torch.cat([batch.samples for batch in generate(model, batch_size=4, **settings)])
    parts = torch.cat([batch.samples for batch in generate(model, batch_size=1, **settings)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert not torch.equal(whole[0], whole[2])


def test_levels_fall_from_1_and_move_up_with_the_resolution() -> None:
    small, large = times(10, (4, 14, 14)), times(10, (16, 128, 128))
    assert float(small[0]) == 1
    assert bool((small.diff() < 0).all())
    assert bool((large[1:] > small[1:]).all())
    assert sampler_for("rectified-flow", "euler").title != sampler_for("flow", "euler").title


def test_writes_pictures_from_prompts_and_from_a_cache(tmp_path: Path) -> None:
    model = saved_flux(tmp_path / "model")
    report = sample(
        model,
        tmp_path / "a",
        prompt="a sneaker | a coat",
        pipeline=PIPELINE,
        num_images=3,
        steps=2,
        device="cpu",
    )
    assert (report.kind, report.sampler, report.guidance) == ("images", "euler", None)
    with np.load(tmp_path / "a" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 8, 8, 3)
    prepared(tmp_path / "cache", data=str(write_pictures(tmp_path / "p", [(8, 8)] * 4)))
    latents = sample(model, tmp_path / "b", cache=tmp_path / "cache", num_images=2, steps=2, device="cpu")
    assert latents.kind == "latents"
    sample(
        model,
        tmp_path / "c",
        cache=tmp_path / "cache",
        pipeline=PIPELINE,
        num_images=1,
        steps=2,
        height=16,
        device="cpu",
    )
    with np.load(tmp_path / "c" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (1, 16, 8, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "nothing to draw"),
        ({"prompt": "a coat"}, "text encoders"),
        ({"prompt": "a coat", "pipeline": PIPELINE, "guidance": 3.0}, "takes no guidance"),
        ({"prompt": "a coat", "pipeline": PIPELINE, "height": 9}, "not possible"),
        ({"prompt": "a coat", "pipeline": "nowhere"}, "no pipeline"),
        ({"cache": "nowhere"}, "no cache"),
    ],
)
def test_what_cannot_be_is_explained(tmp_path: Path, arguments: dict[str, object], said: str) -> None:
    with pytest.raises(DyditError, match=said):
        sample(saved_flux(tmp_path / "model"), tmp_path / "out", device="cpu", **arguments)  # type: ignore[arg-type]
