"""Exports for ComfyUI: the written node on the written weights computes what the dynamic model does, in a stand-in for ComfyUI."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dydit_cli
from dydit_cli.artifacts import load_model
from dydit_cli.dynamic.gates import ThresholdGating
from dydit_cli.errors import DyditError
from dydit_cli.export.comfyui import verify
from dydit_cli.export.comfyui.verify import imported
from dydit_cli.families.text_condition import TextCondition
from tests.export import comfyui_standin as standin
from tests.export.artifacts import exported, trained
from tests.flux_parts import saved_flux
from tests.tiny import CONFIGS, tiny_inputs, tiny_model

NAME = "e.safetensors"


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to export into as ``e``; ComfyUI's models are looked for there."""
    standin.install(monkeypatch, tmp_path / "e")
    standin.BORROWED.clear()
    yield tmp_path
    assert not standin.BORROWED


def written(folder: Path, **changes: Any) -> tuple[Any, ModuleType]:
    """Export a tiny model, whose routers keep about half, as ``e``; return it in compact execution, and its report."""
    source = trained(folder / "m", "flux", **changes)
    report = exported(source, folder / "e", "comfyui")
    return load_model(source), report


def loaded(folder: Path, model: Any) -> standin.ModelPatcher:
    """The written file as ComfyUI loads it: the model's weights alone."""
    tensors = load_file(folder / "e" / NAME)
    return standin.ModelPatcher(standin.BaseModel(standin.Flux(tensors, tuple(model.config.axes_dims_rope))))


def applied(folder: Path, patcher: Any, keep_bias: float = 0.0) -> Any:
    """The MODEL that the written node gives."""
    with imported(folder / "e" / "ComfyUI-dydit") as package:
        node = package.NODE_CLASS_MAPPINGS["DyditApplyFlux"]
        assert NAME in node.INPUT_TYPES()["required"]["routers"][0]
        (result,) = getattr(node(), node.FUNCTION)(patcher, NAME, keep_bias)
    return result


def arguments(condition: TextCondition) -> dict[str, Any]:
    """What ComfyUI calls a prompt."""
    return {"context": condition.prompt_embeds, "y": condition.pooled, "guidance": condition.guidance}


def difference(folder: Path, model: Any, keep_bias: float = 0.0, batch: int = 2) -> float:
    """Between a dynamic model and the patched stand-in, over several times; both really are dynamic."""
    patched, worst, kept = applied(folder, loaded(folder, model), keep_bias), 0.0, []
    sample, _, condition = tiny_inputs(model, batch)
    for time in (0.95, 0.5, 0.1):
        times = torch.full((batch,), time)
        with torch.no_grad():
            expected, routing = model.denoise(sample, times, condition, gating=ThresholdGating(keep_bias))
        found = patched.apply(sample, times, **arguments(condition))
        kept += [routing.tokens.mean(), routing.heads.mean(), routing.groups.mean()]
        worst = max(worst, float((found - expected).abs().max()))
    assert 0.1 < float(torch.stack(kept).mean()) < 0.95
    return worst


# ---------------------------------------------------------------------- the same as the model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_embeds": False},
        {"always_on": False},
        {"width": "ordered"},
        {"width": False},
        {"token_router": "authors"},
        {"num_groups": 4},
    ],
    ids=lambda changes: ", ".join(f"{key} {value}" for key, value in changes.items()) or "dev",
)
def test_the_node_computes_what_the_model_does(nodes: Path, changes: dict[str, Any]) -> None:
    model, report = written(nodes, **changes)
    assert report.max_difference < 1e-4  # of residual streams, which grow to some tens
    assert difference(nodes, model) < 1e-5


def test_the_shipped_flux_runs_in_the_node_as_in_dydit(nodes: Path) -> None:
    """A fresh conversion keeps everything; the dial moves its routers to where they decide."""
    dydit_cli.convert("builtin:flux_fmnist", out=nodes / "m")
    exported(nodes / "m", nodes / "e", "comfyui")
    model = load_model(nodes / "m")
    assert difference(nodes, model, keep_bias=-14.8) < 1e-5


def test_the_dial_is_the_models(nodes: Path) -> None:
    model, _ = written(nodes)
    assert difference(nodes, model, keep_bias=1.5) < 1e-5
    assert difference(nodes, model, keep_bias=-1.5) < 1e-5


def test_without_the_node_the_file_is_the_static_model(nodes: Path) -> None:
    model, _ = written(nodes)
    sample, times, condition = tiny_inputs(model, 2)
    patcher = loaded(nodes, model)
    model.set_execution("static")
    with torch.no_grad():
        expected, _ = model.denoise(sample, times, condition)
    before = patcher.apply(sample, times, **arguments(condition))
    assert float((before - expected).abs().max()) < 1e-5
    applied(nodes, patcher)
    # Applying it gives a copy.
    assert torch.equal(patcher.apply(sample, times, **arguments(condition)), before)
    # And with everything on, the copy is the static model.
    everything = applied(nodes, patcher, keep_bias=1e4)
    found = everything.apply(sample, times, **arguments(condition))
    assert float((found - expected).abs().max()) < 1e-5


def test_samples_of_a_batch_may_have_timesteps_and_tokens_of_their_own(nodes: Path) -> None:
    model, _ = written(nodes)
    patched = applied(nodes, loaded(nodes, model))
    sample, _, condition = tiny_inputs(model, 3)
    times = torch.tensor([0.9, 0.2, 0.9])
    with torch.no_grad():
        expected, routing = model.denoise(sample, times, condition)
    assert len(set(routing.tokens.sum(dim=(1, 2)).tolist())) > 1
    found = patched.apply(sample, times, **arguments(condition))
    assert float((found - expected).abs().max()) < 1e-5


# ---------------------------------------------------------------------- what ComfyUI does around blocks


def test_control_residuals_are_added_as_the_model_adds_them(nodes: Path) -> None:
    model, _ = written(nodes)
    patched = applied(nodes, loaded(nodes, model))
    sample, times, condition = tiny_inputs(model, 1)
    draws = torch.Generator().manual_seed(5)
    tokens, width = model.geometry.num_tokens, model.geometry.hidden_size
    adds = [torch.randn(1, tokens, width, generator=draws) for _ in range(model.geometry.depth)]
    control = {"input": adds[: model.geometry.num_double], "output": adds[model.geometry.num_double :]}
    found = patched.apply(sample, times, control=control, **arguments(condition))
    from dydit_cli.families.flux import image_ids, pack_latents, unpack_latents

    side = sample.shape[-1]
    with torch.no_grad():
        (packed,) = model(
            hidden_states=pack_latents(sample),
            encoder_hidden_states=condition.prompt_embeds,
            pooled_projections=condition.pooled,
            timestep=times,
            img_ids=image_ids(side, side, sample.device, sample.dtype),
            txt_ids=torch.zeros(condition.prompt_embeds.shape[1], 3),
            guidance=condition.guidance,
            controlnet_block_samples=control["input"],
            controlnet_single_block_samples=control["output"],
            return_dict=False,
        )
    expected = unpack_latents(packed, side, side)
    assert float((found - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("form", ["rows", "batch", "heads", "boolean"])
def test_attention_masks_reach_the_active_heads_and_tokens(nodes: Path, form: str) -> None:
    model, _ = written(nodes, always_on=False)
    patcher = loaded(nodes, model)
    sample, times, condition = tiny_inputs(model, 2)
    total = model.geometry.num_tokens + condition.prompt_embeds.shape[1]
    shape = {"rows": (total, total), "batch": (2, total, total), "heads": (2, 6, total, total)}.get(
        form, (total,) * 2
    )
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = mask > -1 if form == "boolean" else mask
    given = {"attention_mask": mask, **arguments(condition)}
    static = patcher.apply(sample, times, **given)
    everything = applied(nodes, patcher, keep_bias=1e4).apply(sample, times, **given)
    assert float((everything - static).abs().max()) < 1e-5
    assert float((static - patcher.apply(sample, times, **arguments(condition))).abs().max()) > 1e-3

    # Dynamically, a mask that changes nothing for any key changes nothing, whatever is on.
    patched = applied(nodes, patcher)
    plain = patched.apply(sample, times, **arguments(condition))
    shifts = torch.randn(*shape[:-1], 1) if form != "boolean" else torch.ones(total, 1)
    level = shifts.expand(shape) > 0 if form == "boolean" else shifts.expand(shape).contiguous()
    assert (
        float(
            (patched.apply(sample, times, attention_mask=level, **arguments(condition)) - plain).abs().max()
        )
        < 1e-5
    )


def test_loras_change_the_node_as_they_change_the_static_model(nodes: Path) -> None:
    """Patches wait at the layers; merged into the dynamic model's weights they give the same."""
    model, _ = written(nodes)
    patcher = loaded(nodes, model)
    patched = applied(nodes, patcher)
    sample, times, condition = tiny_inputs(model, 2)
    before = patched.apply(sample, times, **arguments(condition))
    draws = torch.Generator().manual_seed(2)
    flux = patcher.model.diffusion_model
    for layer in (
        flux.double_blocks[0].img_attn.qkv,
        flux.double_blocks[1].txt_mlp[2],
        flux.single_blocks[0].linear2,
    ):
        change = 0.2 * torch.randn(layer.weight.shape, generator=draws)
        layer.weight_function = (lambda weight, change=change: weight + change,)
    qkv = flux.double_blocks[0].img_attn.qkv.weight_function[0](torch.zeros(()))
    with torch.no_grad():
        attention = model.transformer_blocks[0].attn
        for layer, part in zip((attention.to_q, attention.to_k, attention.to_v), qkv.chunk(3), strict=True):
            layer.weight += part
        model.transformer_blocks[1].ff_context.net[2].weight += (
            flux.double_blocks[1].txt_mlp[2].weight_function[0](0)
        )
        model.single_transformer_blocks[0].proj_out.weight += flux.single_blocks[0].linear2.weight_function[
            0
        ](0)
        expected, _ = model.denoise(sample, times, condition)
    found = patched.apply(sample, times, **arguments(condition))
    assert float((found - expected).abs().max()) < 1e-5
    assert float((found - before).abs().max()) > 1e-3


def test_weights_stored_in_fp8_are_cast_as_comfyui_casts_them(nodes: Path) -> None:
    model, _ = written(nodes)
    patcher, rounded = loaded(nodes, model), loaded(nodes, model)
    for layer in patcher.model.diffusion_model.modules():
        if isinstance(layer, standin.Linear):
            layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    for layer in rounded.model.diffusion_model.modules():
        if isinstance(layer, standin.Linear):
            layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn).float()
    sample, times, condition = tiny_inputs(model, 2)
    found, expected = (
        applied(nodes, each).apply(sample, times, **arguments(condition)) for each in (patcher, rounded)
    )
    assert torch.equal(found, expected)


def test_half_precision_stays_in_its_type(nodes: Path) -> None:
    model, _ = written(nodes)
    patched = applied(nodes, loaded(nodes, model))
    sample, times, condition = tiny_inputs(model, 2)
    halves = {name: value.bfloat16() for name, value in arguments(condition).items() if name != "guidance"}
    found = patched.apply(sample.bfloat16(), times, guidance=condition.guidance, **halves)
    assert found.dtype == torch.bfloat16
    assert bool(found.isfinite().all())


# ---------------------------------------------------------------------- refusals of the node


def refusal(folder: Path, patcher: Any, file: str = NAME) -> str:
    """What the node says instead of a MODEL."""
    with imported(folder / "e" / "ComfyUI-dydit") as package:
        node = package.NODE_CLASS_MAPPINGS["DyditApplyFlux"]()
        with pytest.raises(package.problems.NodeError) as caught:
            node.apply(patcher, file, 0.0)
    return str(caught.value)


def test_files_without_routers_are_refused(nodes: Path) -> None:
    model, _ = written(nodes)
    patcher = loaded(nodes, model)
    tensors = load_file(nodes / "e" / NAME)
    plain = {
        name: tensor
        for name, tensor in tensors.items()
        if "_rate." not in name and "token_selection" not in name and "_order" not in name
    }
    save_file(plain, nodes / "e" / "plain.safetensors")
    assert "has no routers" in refusal(nodes, patcher, "plain.safetensors")
    save_file({"weight": torch.zeros(3)}, nodes / "e" / "other.safetensors")
    assert "is no FLUX in black-forest-labs' layout" in refusal(nodes, patcher, "other.safetensors")
    (nodes / "e" / "text.safetensors").write_text("words")
    assert "cannot be read" in refusal(nodes, patcher, "text.safetensors")
    del tensors["single_blocks.0.mlp_rate.router.bias"]
    save_file(tensors, nodes / "e" / "part.safetensors")
    assert "are not complete" in refusal(nodes, patcher, "part.safetensors")


def test_other_models_are_refused(nodes: Path) -> None:
    model, _ = written(nodes)
    other = tiny_model("flux", num_single_layers=2)
    exported(trained(nodes / "other", "flux", num_single_layers=2), nodes / "o", "comfyui")
    tensors = load_file(nodes / "o" / "o.safetensors")
    axes = tuple(other.config.axes_dims_rope)
    deeper = standin.ModelPatcher(standin.BaseModel(standin.Flux(tensors, axes)))
    assert "The routers belong to another model. They are for 2 + 1 blocks" in refusal(nodes, deeper)
    chroma = loaded(nodes, model)
    del chroma.model.diffusion_model.double_blocks[0].img_mod
    assert "is not a FLUX.1" in refusal(nodes, chroma)
    packed = loaded(nodes, model)
    packed.model.diffusion_model.single_blocks[0].linear1 = torch.nn.Linear(3, 3)
    assert "are not ComfyUI's own" in refusal(nodes, packed)
    scaled = loaded(nodes, model)
    scaled.model.diffusion_model.double_blocks[1].txt_mlp[0].scale_weight = torch.ones(())
    assert "are not ComfyUI's own" in refusal(nodes, scaled)


def test_other_nodes_on_the_same_blocks_are_refused(nodes: Path) -> None:
    model, _ = written(nodes)
    patcher = loaded(nodes, model)
    assert "has already replaced" in refusal(nodes, applied(nodes, patcher))
    sample, times, condition = tiny_inputs(model, 1)
    patched = applied(nodes, patcher)
    patched.set_model_attn1_output_patch(lambda values, _: values)
    with pytest.raises(ValueError, match="attn1_output_patch"):
        patched.apply(sample, times, **arguments(condition))


def test_a_comfyui_without_the_interface_is_told_to_be_updated(
    nodes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = written(nodes)
    sample, times, condition = tiny_inputs(model, 1)
    patched = applied(nodes, loaded(nodes, model))
    patched.wrappers.clear()
    with pytest.raises(ValueError, match="does not have the interface"):
        patched.apply(sample, times, **arguments(condition))
    monkeypatch.delattr(sys.modules["comfy.ops"], "uncast_bias_weight")
    assert "too old" in refusal(nodes, loaded(nodes, model))


# ---------------------------------------------------------------------- the export


def test_the_file_comes_back(nodes: Path) -> None:
    model, report = written(nodes)
    files = {Path(name).name for name in report.files}
    assert {NAME, "README.md", "__init__.py", "patch.py", "blocks.py"} <= files
    assert list(report.sha256) == [NAME]
    axes = ",".join(map(str, CONFIGS["flux"]["axes_dims_rope"]))
    card = (nodes / "e" / "README.md").read_text()
    assert f"dydit convert --checkpoint e/{NAME} --family flux --axes-dims-rope {axes}" in card
    dydit_cli.convert(
        nodes / "e" / NAME,
        out=nodes / "back",
        family="flux",
        axes_dims_rope=CONFIGS["flux"]["axes_dims_rope"],
    )
    back = load_model(nodes / "back").state_dict()
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())


def test_what_comfyui_would_not_load_is_said(nodes: Path) -> None:
    _, report = written(nodes)
    (said,) = [note for note in report.notes if "will not load" in note]
    assert "heads have 8 channels and not 128" in said
    assert "latents have 4 channels and not 16" in said
    assert any("stand-in" in note for note in report.notes)


def test_types_are_cast(nodes: Path) -> None:
    report = exported(saved_flux(nodes / "m"), nodes / "e", "comfyui", dtype="bfloat16")
    assert report.dtype == "bfloat16"
    assert report.max_difference < 1e-3
    with safe_open(nodes / "e" / NAME, framework="pt") as file:
        assert file.get_tensor("double_blocks.0.attn_rate.router.weight").dtype == torch.bfloat16
        assert file.get_tensor("img_in.weight").dtype == torch.bfloat16


def test_a_large_model_is_verified_with_a_block_of_either_kind(
    nodes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "RUNNABLE", 1000)
    _, report = written(nodes)
    assert any("one of either kind" in note for note in report.notes)
    assert report.max_difference < 1e-4


def test_a_wrong_node_is_noticed(nodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dydit_cli.export.comfyui import format as comfyui

    copy = comfyui.copy_node

    def broken(folder: Path) -> None:
        copy(folder)
        path = folder / "blocks.py"
        path.write_text(path.read_text().replace('approximate="tanh"', 'approximate="none"'))

    monkeypatch.setattr(comfyui, "copy_node", broken)
    with pytest.raises(DyditError, match="does not compute what its source computes"):
        written(nodes)
    assert not (nodes / "e").exists()


@pytest.mark.parametrize("option", ["vae", "pipeline"])
def test_parts_of_a_pipeline_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(DyditError, match="takes no"):
        exported(saved_flux(tmp_path / "m"), tmp_path / "e", "comfyui", **{option: "somewhere"})


def test_other_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DyditError, match="does not take a DiT"):
        exported(trained(tmp_path / "m", "dit"), tmp_path / "e", "comfyui")


def test_the_node_needs_torch_alone(tmp_path: Path) -> None:
    exported(saved_flux(tmp_path / "m"), tmp_path / "e", "comfyui")
    script = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dydit_cli", "diffusers", "transformers", "einops", "comfy", "folder_paths"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import importlib
sys.path.insert(0, "e")
package = importlib.import_module("ComfyUI-dydit")
assert set(package.NODE_CLASS_MAPPINGS) == set(package.NODE_DISPLAY_NAME_MAPPINGS)
routers = package.reading.read_routers("e/e.safetensors")
assert (routers.shape.double, routers.shape.single) == (1, 2)
assert "dydit_cli" not in sys.modules and "diffusers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
