"""Exports of FLUX: the stock pipeline's pictures three ways, the file with routers and back, the static model bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import dydit_cli
from dydit_cli.artifacts import load_model, save_model
from dydit_cli.cli.app import main
from dydit_cli.errors import DyditError
from dydit_cli.export import flux, flux_verify
from dydit_cli.export.inline import FLUX_ROOTS, inline
from dydit_cli.export.registration import register
from dydit_cli.families import original_flux
from tests.export.artifacts import exported, trained
from tests.export.test_pipeline import run
from tests.flux_parts import CONFIG, PIPELINE, saved_flux, small_flux, stock_pipeline
from tests.tiny import bits

SIZES = [(8, 8), (16, 12)]
STEPS = 3
CALL: dict[str, Any] = {
    "prompt": "a sneaker",
    "negative_prompt": "a coat",
    "true_cfg_scale": 2.0,
    "guidance_scale": 3.5,
    "num_inference_steps": STEPS,
    "max_sequence_length": 7,
    "output_type": "pt",
}


@pytest.fixture(autouse=True)
def registered() -> None:
    """As `import dydit_cli` does."""
    register()


def draw(pipeline: FluxPipeline, height: int, width: int) -> Tensor:
    """(1, C, height, width), guided by the embedded scale and by a negative prompt."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(height=height, width=width, generator=generator, **CALL).images


def pictures(pipeline: FluxPipeline) -> list[Tensor]:
    """At both resolutions."""
    return [draw(pipeline, *size) for size in SIZES]


def static_file(path: Path, layout: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Write a static FLUX as a single file or a folder of diffusers; return its tensors."""
    state = {
        key: tensor.to(dtype)
        for key, tensor in small_flux(guidance_embeds=True).state_dict().items()
        if not original_flux.is_ours(key)
    }
    if layout == "diffusers":
        names = ("sample_size", "text_tokens")
        config = {name: value for name, value in CONFIG.items() if name not in names}
        static = FluxTransformer2DModel(**config, guidance_embeds=True)
        static.load_state_dict(state)
        static.to(dtype).save_pretrained(str(path))
        return state
    tensors = original_flux.write(state)
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return tensors


# ---------------------------------------------------------------------- pipeline folders


def test_three_ways_give_the_pictures_of_the_source(tmp_path: Path) -> None:
    source = saved_flux(tmp_path / "m", guidance_embeds=True)
    stock_pipeline(tmp_path / "parts", guidance_embeds=True)
    report = exported(source, tmp_path / "e", pipeline=str(tmp_path / "parts"))
    assert report.max_difference == 0.0
    assert (report.needs_vae, report.notes) == (False, ())
    expected = pictures(FluxPipeline.from_pretrained(str(tmp_path / "parts"), transformer=load_model(source)))
    assert [tuple(image.shape[2:]) for image in expected] == SIZES
    static = pictures(
        FluxPipeline.from_pretrained(
            str(tmp_path / "parts"), transformer=load_model(source, execution="static")
        )
    )
    assert not torch.allclose(expected[0], static[0], atol=1e-3)

    one = FluxPipeline.from_pretrained(str(tmp_path / "e"))
    assert type(one.transformer).__module__ == "dydit_cli.families.flux"
    assert one.transformer.execution == "compact"
    three = FluxPipeline.from_pretrained(
        str(tmp_path / "e"), transformer=dydit_cli.load_model(tmp_path / "e")
    )
    script = f"""
import torch
from diffusers import FluxPipeline
try:
    FluxPipeline.from_pretrained("e")
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise SystemExit("code of a folder ran without leave")
pipeline = FluxPipeline.from_pretrained("e", trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
torch.save([
    pipeline(height=height, width=width, generator=torch.Generator().manual_seed(0), **{CALL!r}).images
    for height, width in {SIZES!r}
], "images.pt")
assert "dydit_cli" not in sys.modules
"""
    run(script, tmp_path)
    two = torch.load(tmp_path / "images.pt", weights_only=True)
    for found in (pictures(one), two, pictures(three)):
        for image, other in zip(found, expected, strict=True):
            assert float((image - other).abs().max()) <= 1e-5


def test_a_shipped_pipeline_brings_its_own_autoencoder(tmp_path: Path) -> None:
    source = saved_flux(tmp_path / "m")
    exported(source, tmp_path / "e", pipeline=PIPELINE)
    index = json.loads((tmp_path / "e" / "model_index.json").read_text())
    assert index["vae"] == ["modeling_dydit", "PatchAutoencoder"]
    pipeline = FluxPipeline.from_pretrained(str(tmp_path / "e"))
    assert type(pipeline.vae).__module__ == "dydit_cli.pipelines.patch_autoencoder"
    expected = draw(pipeline, 8, 8)
    script = f"""
import torch
from diffusers import FluxPipeline
pipeline = FluxPipeline.from_pretrained("e", trust_remote_code=True)
image = pipeline(height=8, width=8, generator=torch.Generator().manual_seed(0), **{CALL!r}).images
torch.save(image, "image.pt")
"""
    run(script, tmp_path)
    torch.testing.assert_close(
        torch.load(tmp_path / "image.pt", weights_only=True), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("given", "guided", "dtype"), [(True, True, None), (False, False, None), (True, False, "bfloat16")]
)
def test_the_snippets_of_the_card_run(
    given: bool, guided: bool, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import utils

    monkeypatch.setattr(utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = saved_flux(tmp_path / "m", guidance_embeds=guided)
    stock_pipeline(tmp_path / "parts", guidance_embeds=guided)
    report = exported(
        source, tmp_path / "e", pipeline=str(tmp_path / "parts") if given else None, dtype=dtype
    )
    assert report.needs_vae is not given
    assert report.dtype == (dtype or "float32")
    card = (tmp_path / "e" / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        assert ("**parts" in snippet) is not given
        snippet = re.sub(r"black-forest-labs/FLUX.1-\w+", str(tmp_path / "parts"), snippet)
        Path("image.png").unlink(missing_ok=True)
        exec(compile(snippet, "README.md", "exec"), {})
        assert Path("image.png").stat().st_size > 0
    assert "dydit_cli" not in next(snippet for snippet in snippets if "trust_remote_code" in snippet)


def test_without_a_pipeline_the_schedule_is_flux_s_and_the_rest_is_missing(tmp_path: Path) -> None:
    for guided, shift in ((True, 3.0), (False, 1.0)):
        source = saved_flux(tmp_path / f"m{guided}", guidance_embeds=guided)
        report = exported(source, tmp_path / f"e{guided}")
        assert any("--pipeline FOLDER" in note for note in report.notes)
        scheduler = json.loads((tmp_path / f"e{guided}" / "scheduler" / "scheduler_config.json").read_text())
        assert (scheduler["shift"], scheduler["use_dynamic_shifting"]) == (shift, guided)
        index = json.loads((tmp_path / f"e{guided}" / "model_index.json").read_text())
        assert index["text_encoder_2"] == index["vae"] == [None, None]
    with pytest.raises(ValueError, match="expected"):
        FluxPipeline.from_pretrained(str(tmp_path / "eTrue"))


def test_the_pipeline_follows_the_model_s_inputs(tmp_path: Path) -> None:
    for extra, name in ((0, "FluxPipeline"), (16, "FluxControlPipeline"), (80, "FluxFillPipeline")):
        model = small_flux(in_channels=16 + extra, out_channels=16)
        assert flux.pipeline_of(model.geometry, None) == name
        for given, drives in (
            ("FluxKontextPipeline", "FluxPipeline"),
            ("FluxImg2ImgPipeline", "FluxPipeline"),
            ("FluxControlImg2ImgPipeline", "FluxControlPipeline"),
            ("FluxFillPipeline", "FluxFillPipeline"),
            # It would need a ControlNet, which no export has.
            ("FluxControlNetPipeline", None),
            ("FluxNoSuchPipeline", None),
        ):
            assert flux.pipeline_of(model.geometry, given) == (given if drives == name else name)
    saved = saved_flux(tmp_path / "m", in_channels=96, out_channels=16)
    assert exported(saved, tmp_path / "e").max_difference == 0.0


def test_shards_types_and_a_second_export(tmp_path: Path) -> None:
    source = saved_flux(tmp_path / "m")
    report = exported(source, tmp_path / "e", max_shard_size="50KB", dtype="bfloat16")
    assert sum("diffusion_pytorch_model-" in name for name in report.files) > 2
    assert (report.dtype, report.max_difference) == ("bfloat16", 0.0)
    exported(tmp_path / "e", tmp_path / "e2")
    first, second = load_model(tmp_path / "e").state_dict(), load_model(tmp_path / "e2").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_large_model_is_run_with_one_block_of_either_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flux_verify, "RUNNABLE", 1000)
    source = saved_flux(tmp_path / "m", num_layers=2)
    report = exported(source, tmp_path / "e")
    assert report.max_difference == 0.0
    assert any("one block of either kind" in note for note in report.notes)


@pytest.mark.parametrize("runnable", [50_000_000, 1000])
def test_code_that_computes_something_else_is_an_error(
    runnable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = inline(FLUX_ROOTS)
    assert text.count("timestep.to(scaled_in) * 1000") == 1
    wrong = text.replace("timestep.to(scaled_in) * 1000", "timestep.to(scaled_in) * 900")
    monkeypatch.setattr(flux, "inline", lambda roots: wrong)
    monkeypatch.setattr(flux_verify, "RUNNABLE", runnable)
    with pytest.raises(DyditError, match="does not compute what its source computes"):
        exported(saved_flux(tmp_path / "m"), tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_each_family_ships_what_it_needs() -> None:
    flux_code, other = inline(FLUX_ROOTS), inline()
    assert "transformer_flux" not in other
    assert "class DyFlux" not in other
    assert "class DyDiT" not in flux_code
    assert "class IdentityAutoencoder" not in flux_code


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("layout", ["original", "diffusers", "torch"])
def test_static_is_the_source_bit_for_bit(layout: str, tmp_path: Path) -> None:
    name = {"original": "s.safetensors", "diffusers": "s", "torch": "s.pt"}[layout]
    tensors = static_file(tmp_path / name, layout)
    dydit_cli.convert(tmp_path / name, out=tmp_path / "c", axes_dims_rope=(2, 2, 4))
    report = exported(tmp_path / "c", tmp_path / "e", "static")
    assert report.dtype == "bfloat16"
    if layout == "diffusers":
        model = FluxTransformer2DModel.from_pretrained(str(tmp_path / "e"), torch_dtype=torch.bfloat16)
        found = model.state_dict()
    elif layout == "original":
        found = load_file(tmp_path / "e" / "model.safetensors")
    else:
        found = torch.load(tmp_path / "e" / "model.pt", weights_only=True)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(bits(found[key]), bits(tensor)), key
    card = (tmp_path / "e" / "README.md").read_text(encoding="utf-8")
    assert "bit for bit" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    exec(compile(code, "README.md", "exec"), {})


def test_the_file_with_routers_is_read_back(tmp_path: Path) -> None:
    source = saved_flux(tmp_path / "m", num_groups=8, token_rank=3)
    model = load_model(source)
    for name, order in model.named_buffers():
        if name.endswith("_order"):
            order.copy_(order.flip(0))
    save_model(model, tmp_path / "shuffled")
    report = exported(tmp_path / "shuffled", tmp_path / "e", "original")
    assert any("order" in note for note in report.notes)
    written = load_file(tmp_path / "e" / "model.safetensors")
    assert "double_blocks.0.attn_rate.router.weight" in written
    assert "single_blocks.1.mlp.channel_order" in written
    assert not any("transformer_blocks" in key or "_router." in key for key in written)
    card = (tmp_path / "e" / "README.md").read_text(encoding="utf-8")
    command = re.findall(r"dydit (convert .*)", card)[0]
    words = command.replace("e/model.safetensors", str(tmp_path / "e" / "model.safetensors")).split()
    assert main([*words[:-1], str(tmp_path / "c")]) == 0
    again, state = load_model(tmp_path / "c").state_dict(), model.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(bits(again[key]), bits(state[key])) for key in state)


def test_the_authors_layout_comes_back(tmp_path: Path) -> None:
    source = saved_flux(tmp_path / "m", width=False, token_router="authors")
    report = exported(source, tmp_path / "e", "original")
    assert report.notes == ()
    written = load_file(tmp_path / "e" / "model.safetensors")
    assert "transformer_blocks.0.token_selection.linear_t.weight" in written
    assert not any(key.endswith("_order") for key in written)
    dydit_cli.convert(tmp_path / "e" / "model.safetensors", out=tmp_path / "c", axes_dims_rope=(2, 2, 4))
    again, state = load_model(tmp_path / "c").state_dict(), load_model(source).state_dict()
    assert all(torch.equal(bits(again[key]), bits(state[key])) for key in state)


def test_static_after_fine_tuning_is_the_complete_model(tmp_path: Path) -> None:
    """Nothing is recorded of its past: a folder for diffusers."""
    source = saved_flux(tmp_path / "m")
    report = exported(source, tmp_path / "e", "static")
    assert any("not recorded" in note for note in report.notes)
    state = load_model(source).state_dict()
    found = FluxTransformer2DModel.from_pretrained(str(tmp_path / "e")).state_dict()
    assert all(torch.equal(found[key], state[key]) for key in found)


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("settings", "changes", "what"),
    [
        ({"pipeline": "nowhere"}, {}, "There is no pipeline at nowhere"),
        ({"pipeline": "builtin:flux_fminst"}, {}, "no shipped pipeline"),
        (
            {"pipeline": PIPELINE},
            {"joint_attention_dim": 24},
            "embeddings of 32 channels, the model takes 24",
        ),
        ({"pipeline": PIPELINE}, {"in_channels": 32}, "latents have 4 channels, the model's 8"),
        ({"vae": "nowhere"}, {}, "There is no autoencoder at"),
        ({"budget": 0.5}, {}, "no budgets"),
        ({"kind": "static", "pipeline": PIPELINE}, {}, "takes no pipeline"),
        ({"kind": "original", "vae": "v"}, {}, "takes no autoencoder"),
        ({"kind": "original"}, {"width": "ordered"}, "ordered width"),
        ({"kind": "static"}, {"mlp_hidden_size": 64}, "no MLPs of 64"),
    ],
)
def test_mistakes(settings: dict[str, Any], changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    source = saved_flux(tmp_path / "m", **changes)
    with pytest.raises(DyditError, match=re.escape(what)):
        exported(source, tmp_path / "e", **settings)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_damaged_part_and_code_in_a_pipeline(tmp_path: Path) -> None:
    source = saved_flux(tmp_path / "m")
    stock_pipeline(tmp_path / "parts")
    (tmp_path / "parts" / "tokenizer" / "code.py").write_text("raise SystemExit")
    exported(source, tmp_path / "e", pipeline=str(tmp_path / "parts"))
    assert not (tmp_path / "e" / "tokenizer" / "code.py").exists()
    weights = tmp_path / "parts" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(DyditError, match="autoencoder"):
        exported(source, tmp_path / "e2", pipeline=str(tmp_path / "parts"))
    index = tmp_path / "parts" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder": ["evil", "Encoder"]}))
    with pytest.raises(DyditError, match="no part that diffusers loads by itself"):
        exported(source, tmp_path / "e2", pipeline=str(tmp_path / "parts"))
    assert not (tmp_path / "e2").exists()


def test_damaged_weights(tmp_path: Path) -> None:
    source = saved_flux(tmp_path / "m")
    state = load_file(source / "diffusion_pytorch_model.safetensors")
    del state["proj_out.bias"]
    save_file(state, source / "diffusion_pytorch_model.safetensors")
    for kind in ("diffusers", "original", "static"):
        with pytest.raises(DyditError, match="are not those of its config"):
            exported(source, tmp_path / "e", kind)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved_flux(tmp_path / "m")
    assert main(["export", "--model", str(source), "--pipeline", PIPELINE, "--out", "e"]) == 0
    captured = capsys.readouterr()
    assert (Path("e") / "transformer" / "modeling_dydit.py").is_file()
    assert "diffusers, float32" in captured.out
    assert "differs from the model by at most 0.0e+00" in captured.out


def test_other_families_have_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(DyditError, match="takes no --pipeline"):
        exported(trained(tmp_path / "t"), tmp_path / "e", pipeline=PIPELINE)
