"""Exported folders in the stock pipeline: three ways to load them, with guidance, and what they compute there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler
from torch import Tensor

import dydit_cli
from dydit_cli.artifacts import load_model, read_manifest
from dydit_cli.errors import DyditError
from dydit_cli.export.registration import register
from tests.export.artifacts import converted, exported, tiny_vae, trained
from tests.export.test_inline import WITHOUT_PACKAGE
from tests.flux_parts import PIPELINE, saved_flux

FAMILIES = pytest.mark.parametrize("family", ["dit", "sit"])
CLASSES = [3, 1]
STEPS = 5
GUIDANCE = 3.0


@pytest.fixture(autouse=True)
def registered() -> None:
    """As `import dydit_cli` does."""
    register()


def draw(pipeline: DiTPipeline, guidance: float = GUIDANCE) -> Tensor:
    """(B, C, h, w) images in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    result = pipeline(
        class_labels=CLASSES,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        generator=generator,
        output_type="pt",
    )
    return result.images


def run(script: str, folder: Path) -> str:
    """Run a script in a process of its own that cannot import the package; return what it printed."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-I", "-W", "ignore", "-c", WITHOUT_PACKAGE + script]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


# ---------------------------------------------------------------------- the three ways


@FAMILIES
def test_way_one_after_importing_the_package(family: str, tmp_path: Path) -> None:
    exported(trained(tmp_path / "t", family, in_channels=1), tmp_path / "e")
    pipeline = DiTPipeline.from_pretrained(str(tmp_path / "e"))
    assert type(pipeline.transformer).__module__ == f"dydit_cli.families.{family}"
    assert pipeline.transformer.execution == "compact"
    images = draw(pipeline)
    assert images.shape == (2, 1, 8, 8)
    assert not torch.equal(images, draw(pipeline, guidance=1.0))


def test_way_two_with_diffusers_alone(tmp_path: Path) -> None:
    expected = {}
    for family in ("dit", "sit"):
        exported(trained(tmp_path / family, family, in_channels=1), tmp_path / f"e_{family}")
        expected[family] = draw(DiTPipeline.from_pretrained(str(tmp_path / f"e_{family}")))
    # All are loaded before any is used: each keeps the classes that it was loaded with.
    script = f"""
import torch
from diffusers import DiTPipeline
try:
    DiTPipeline.from_pretrained("e_dit")
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise SystemExit("code of a folder ran without leave")
names = ("dit", "sit", "dit")
pipelines = [DiTPipeline.from_pretrained(f"e_{{name}}", trust_remote_code=True) for name in names]
images = []
for pipeline in pipelines:
    assert pipeline.transformer.execution == "compact"
    assert sys.modules[type(pipeline.transformer).__module__].DynamicAttention is type(pipeline.transformer.blocks[0].attn)
    generator = torch.Generator().manual_seed(0)
    images.append(pipeline(
        class_labels={CLASSES}, guidance_scale={GUIDANCE}, num_inference_steps={STEPS}, generator=generator, output_type="pt"
    ).images)
assert "dydit_cli" not in sys.modules
torch.save(images, "images.pt")
"""
    run(script, tmp_path)
    found = torch.load(tmp_path / "images.pt", weights_only=True)
    for image, family in zip(found, ("dit", "sit", "dit"), strict=True):
        assert torch.equal(image, expected[family])


@FAMILIES
def test_way_three_with_a_transformer_of_ones_own(family: str, tmp_path: Path) -> None:
    exported(trained(tmp_path / "t", family, in_channels=1), tmp_path / "e")
    expected = draw(DiTPipeline.from_pretrained(str(tmp_path / "e")))
    for options in ({}, {"torch_dtype": torch.bfloat16}):
        transformer = dydit_cli.load_model(tmp_path / "e", **options)
        pipeline = DiTPipeline.from_pretrained(str(tmp_path / "e"), transformer=transformer)
        assert pipeline.transformer is transformer
        difference = float((draw(pipeline).float() - expected).abs().mean())
        assert difference == 0 if not options else difference < 0.1


def test_a_pipeline_that_diffusers_saved_again_loads_with_the_package(tmp_path: Path) -> None:
    exported(trained(tmp_path / "t", "sit", in_channels=1), tmp_path / "e")
    pipeline = DiTPipeline.from_pretrained(str(tmp_path / "e"))
    pipeline.save_pretrained(str(tmp_path / "again"))
    assert torch.equal(draw(DiTPipeline.from_pretrained(str(tmp_path / "again"))), draw(pipeline))


# ---------------------------------------------------------------------- what they compute


def guided(model: Callable[..., tuple[Tensor, ...]], null: int) -> Callable[[Tensor, float], Tensor]:
    """The pipeline's guidance on all channels, written plainly."""

    def predict(state: Tensor, time: float) -> Tensor:
        labels = torch.tensor([*CLASSES, *[null] * len(CLASSES)])
        both = model(torch.cat([state, state]), torch.full((len(labels),), time), labels, return_dict=False)[
            0
        ]
        kept, dropped = both[:, : state.shape[1]].chunk(2)
        return dropped + GUIDANCE * (kept - dropped)

    return predict


def first_noise(channels: int) -> Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_dit_pipeline_is_ddim_of_the_native_model(tmp_path: Path) -> None:
    exported(trained(tmp_path / "t", "dit", in_channels=1), tmp_path / "e")
    model = load_model(tmp_path / "t")
    field = guided(model, null=10)
    products = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    times = [999, 799, 599, 399, 199]
    state = first_noise(1)
    for time, after in zip(times, [*times[1:], None], strict=True):
        noise = field(state, float(time))
        now, then = products[time], products[after] if after is not None else torch.tensor(1.0)
        clean = (state - (1 - now).sqrt() * noise) / now.sqrt()
        state = (then.sqrt() * clean + (1 - then).sqrt() * noise).float()
    expected = (state / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(
        draw(DiTPipeline.from_pretrained(str(tmp_path / "e"))), expected, atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_a_sit_pipeline_is_eulers_method_on_the_native_model(tmp_path: Path) -> None:
    exported(trained(tmp_path / "t", "sit", in_channels=1), tmp_path / "e")
    pipeline = DiTPipeline.from_pretrained(str(tmp_path / "e"))
    images = draw(pipeline)
    field = guided(load_model(tmp_path / "t"), null=10)
    times = 1 - pipeline.scheduler.timesteps.double() / 1000
    grid = 1 - pipeline.scheduler.sigmas.double()
    state = first_noise(1)
    for time, begin, end in zip(times, grid[:-1], grid[1:], strict=True):
        state = state + float(end - begin) * field(state, float(time))
    torch.testing.assert_close(images, (state / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)
    # The grid is the plain one, to a thousandth.
    assert grid.tolist() == pytest.approx([k / STEPS for k in range(STEPS + 1)], abs=1.1e-3)
    assert times.tolist() == pytest.approx([k / STEPS for k in range(STEPS)], abs=2e-3)


def test_compact_execution_and_plans_work_inside_the_pipeline(tmp_path: Path) -> None:
    exported(trained(tmp_path / "t", "sit", in_channels=1), tmp_path / "e")
    pipeline = DiTPipeline.from_pretrained(str(tmp_path / "e"))
    expected = draw(pipeline)
    pipeline.scheduler.set_timesteps(STEPS)
    plan = pipeline.transformer.plan(pipeline.scheduler.timesteps)
    torch.testing.assert_close(draw(pipeline), expected, atol=1e-4, rtol=0)
    assert (plan.hits, plan.misses) == (STEPS, 0)
    pipeline.transformer.set_execution("static")
    assert not torch.allclose(draw(pipeline), expected, atol=1e-3)


def test_other_schedulers_take_the_configuration(tmp_path: Path) -> None:
    for family, scheduler, options in (
        ("dit", DPMSolverMultistepScheduler, {}),
        ("sit", DPMSolverMultistepScheduler, {"solver_order": 2}),
    ):
        exported(trained(tmp_path / family, family, in_channels=3), tmp_path / f"e_{family}")
        pipeline = DiTPipeline.from_pretrained(str(tmp_path / f"e_{family}"))
        before = draw(pipeline)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
        images = draw(pipeline)
        assert torch.isfinite(images).all()
        assert not torch.equal(images, before)


# ---------------------------------------------------------------------- autoencoders


def test_a_latent_model_without_autoencoder_takes_one_at_loading(tmp_path: Path) -> None:
    report = exported(trained(tmp_path / "t"), tmp_path / "e")
    assert report.needs_vae
    assert any("--vae" in note for note in report.notes)
    vae = AutoencoderKL.from_pretrained(str(tiny_vae(tmp_path / "vae")))
    images = draw(DiTPipeline.from_pretrained(str(tmp_path / "e"), vae=vae))
    assert images.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="expected"):
        DiTPipeline.from_pretrained(str(tmp_path / "e"))


@pytest.mark.parametrize("inner", ["", "vae"])
def test_an_autoencoder_is_copied_in(inner: str, tmp_path: Path) -> None:
    tiny_vae(tmp_path / "given" / inner)
    report = exported(trained(tmp_path / "t", "sit"), tmp_path / "e", vae=str(tmp_path / "given"))
    assert not report.needs_vae
    assert "vae/diffusion_pytorch_model.safetensors" in report.files
    assert not (tmp_path / "e" / "vae" / "modeling_dydit.py").exists()
    pipeline = DiTPipeline.from_pretrained(str(tmp_path / "e"))
    assert isinstance(pipeline.vae, AutoencoderKL)
    assert draw(pipeline).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_pixel_model_draws_pictures(channels: int, mode: str, tmp_path: Path) -> None:
    exported(trained(tmp_path / "t", in_channels=channels), tmp_path / "e")
    pipeline = DiTPipeline.from_pretrained(str(tmp_path / "e"))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(class_labels=[0], num_inference_steps=2).images
    assert (images[0].mode, images[0].size) == (mode, (8, 8))
    assert pipeline.to(torch.bfloat16).vae.dtype == torch.bfloat16
    assert pipeline(class_labels=[0], num_inference_steps=2).images[0].mode == mode


def broken_vae(kind: str, folder: Path) -> None:
    if kind == "absent":
        return
    tiny_vae(folder, latent_channels=3 if kind == "channels" else 4)
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    if kind == "no config":
        config.unlink()
    elif kind == "bad config":
        config.write_text("{")
    elif kind == "class":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "VQModel"}))
    elif kind == "no weights":
        weights.unlink()
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:500])


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("absent", "There is no autoencoder at"),
        ("no config", "There is no autoencoder at"),
        ("bad config", "cannot be read"),
        ("class", "VQModel, not an AutoencoderKL"),
        ("channels", "latents have 3 channels, the model's 4"),
        ("no weights", "has no weights"),
        ("cut", "cannot be loaded"),
    ],
)
def test_a_wrong_autoencoder_is_refused_and_nothing_is_left(kind: str, what: str, tmp_path: Path) -> None:
    broken_vae(kind, tmp_path / "vae")
    model = trained(tmp_path / "t")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DyditError, match=re.escape(what)):
        exported(model, tmp_path / "e", vae=str(tmp_path / "vae"))
    assert sorted(tmp_path.iterdir()) == before


# ---------------------------------------------------------------------- folder, card, labels


@FAMILIES
def test_the_folder_explains_itself(family: str, tmp_path: Path) -> None:
    converted(tmp_path / "c", family)
    report = exported(tmp_path / "c", tmp_path / "e", max_shard_size="200KB")
    assert report.max_difference == 0.0
    assert sum(name.startswith("transformer/diffusion_pytorch_model-") for name in report.files) > 1
    manifest = read_manifest(tmp_path / "e")
    assert manifest["stage"] == "export"
    assert manifest["results"]["lineage"]["base"].endswith("c.pt")
    assert set(manifest["results"]["sha256"]) <= set(report.files)
    card = (tmp_path / "e" / "README.md").read_text(encoding="utf-8")
    assert "| base model | `c.pt` |" in card
    assert str(tmp_path) not in card
    assert "the routers keep everything" in card
    scheduler = json.loads((tmp_path / "e" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == {"dit": "DDIMScheduler", "sit": "DPMSolverMultistepScheduler"}[family]


def test_an_export_can_be_exported_again(tmp_path: Path) -> None:
    names = tuple("abcdefghij")
    exported(trained(tmp_path / "t", "sit", in_channels=1, classes=names), tmp_path / "e")
    exported(tmp_path / "e", tmp_path / "e2")
    first, second = (DiTPipeline.from_pretrained(str(tmp_path / name)) for name in ("e", "e2"))
    assert torch.equal(draw(first), draw(second))
    assert second.labels == first.labels == {name: label for label, name in enumerate(names)}
    assert "0.512 (target 0.5)" in (tmp_path / "e2" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("latent", [False, True])
@FAMILIES
def test_the_snippets_of_the_card_run(
    family: str, latent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import utils

    names = tuple("abcdefghij") if not latent else ()
    dtype = "bfloat16" if latent else "float32"
    exported(
        trained(tmp_path / "t", family, in_channels=4 if latent else 1, classes=names),
        tmp_path / "e",
        dtype=dtype,
    )
    card = (tmp_path / "e" / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 3
    monkeypatch.setattr(utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    vae = tiny_vae(tmp_path / "vae")
    for snippet in snippets:
        if latent:
            assert "vae=vae" in snippet
            snippet = snippet.replace("stabilityai/sd-vae-ft-ema", str(vae))
        else:
            assert 'get_label_ids(["a", "b"])' in snippet
        Path("image.png").unlink(missing_ok=True)
        exec(compile(snippet, "README.md", "exec"), {})
        assert Path("image.png").stat().st_size > 0
    without = next(snippet for snippet in snippets if "trust_remote_code" in snippet)
    assert "dydit_cli" not in without


def test_fashion_mnist_models_know_their_classes(tmp_path: Path) -> None:
    dydit_cli.convert("builtin:dit_fmnist", out=tmp_path / "c")
    exported(tmp_path / "c", tmp_path / "e")
    pipeline = DiTPipeline.from_pretrained(str(tmp_path / "e"))
    assert pipeline.get_label_ids(["Ankle boot", "T-shirt/top"]) == [9, 0]
    manifest = (tmp_path / "e" / "manifest.json").read_text()
    assert json.loads(manifest)["results"]["lineage"]["base"] == "builtin:dit_fmnist"


def test_classes_that_nobody_named_have_numbers(tmp_path: Path) -> None:
    exported(trained(tmp_path / "t", in_channels=1, classes=("only", "two")), tmp_path / "e")
    assert DiTPipeline.from_pretrained(str(tmp_path / "e")).labels == {}


@FAMILIES
def test_half_precision(family: str, tmp_path: Path) -> None:
    report = exported(trained(tmp_path / "t", family, in_channels=1), tmp_path / "e", dtype="bfloat16")
    assert (report.dtype, report.max_difference) == ("bfloat16", 0.0)
    pipeline = DiTPipeline.from_pretrained(str(tmp_path / "e"), torch_dtype=torch.bfloat16)
    assert pipeline.transformer.dtype == torch.bfloat16
    assert torch.isfinite(draw(pipeline).float()).all()


def test_a_reload_that_differs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dydit_cli.export import pipeline

    monkeypatch.setattr(pipeline, "inline", lambda: inline_with_a_mistake())
    with pytest.raises(DyditError, match="does not compute what its source computes"):
        exported(trained(tmp_path / "t", in_channels=1), tmp_path / "e")
    assert not (tmp_path / "e").exists()


def inline_with_a_mistake() -> str:
    from dydit_cli.export.inline import inline

    text = inline()
    assert text.count("angles = timestep.float()") == 1
    return text.replace("angles = timestep.float()", "angles = 1.01 * timestep.float()")


def test_the_scheduler_of_a_dit_is_the_one_that_it_was_trained_with(tmp_path: Path) -> None:
    exported(trained(tmp_path / "t", in_channels=1), tmp_path / "e")
    scheduler = DDIMScheduler.from_pretrained(str(tmp_path / "e" / "scheduler"))
    assert float(scheduler.betas[0]) == pytest.approx(1e-4)
    assert float(scheduler.betas[-1]) == pytest.approx(0.02)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[0] == 999


def test_the_code_of_the_export_page_runs(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import utils

    exported(trained(Path("runs/trained"), in_channels=1), Path("runs/pipeline"))
    exported(Path("runs/trained"), Path("runs/baked"), "baked", steps=20)
    exported(trained(Path("runs/latent-trained")), Path("runs/latent"))
    exported(saved_flux(Path("runs/flux")), Path("runs/flux-pipeline"), pipeline=PIPELINE)
    vae = tiny_vae(Path("vae"))
    monkeypatch.setattr(utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(Path("modules").resolve()))
    page = (repository / "docs" / "export.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    # Programs and graphs are run where they are written: test_programs.py and test_onnx.py.
    snippets = [code for code in snippets if "model.pt2" not in code and "model.onnx" not in code]
    assert len(snippets) == 7
    for snippet in snippets:
        exec(compile(snippet.replace("stabilityai/sd-vae-ft-ema", str(vae)), "export.md", "exec"), {})
    assert Path("runs/static/model.pt").is_file()
