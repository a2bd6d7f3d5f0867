"""The baked schedule: what the dynamic model computes at its timesteps, exactly, without width routers; and nothing at others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dydit_cli.artifacts import load_model
from dydit_cli.artifacts.loading import load_for_training
from dydit_cli.dynamic.gates import CompleteGating, ThresholdGating
from dydit_cli.errors import DyditError
from dydit_cli.export.baked import bake, decided
from dydit_cli.export.schedule import schedule_of
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.flops import executed_ratio, macs_of
from dydit_cli.inspection.inspect import inspect
from dydit_cli.profiling.counting import count_compact
from dydit_cli.profiling.profile import profile
from dydit_cli.sampling.run import sample
from tests.export.artifacts import exported, trained
from tests.export.test_pipeline import CLASSES, GUIDANCE, run
from tests.tiny import tiny_inputs, tiny_model

BUDGETS = {"budgets": [0.3, 1.0], "default_budget": 0.6}
VARIANTS = {
    "dit": ("dit", {}),
    "sit": ("sit", {}),
    "latte": ("latte", {}),
    "ordered width": ("dit", {"width": "ordered"}),
    "budgets": ("dit", BUDGETS),
    "weights that follow the timestep": ("dit", {"td_lora": {"rank": 2, "experts": 2}}),
    "no always-on unit": ("dit", {"always_on": False}),
}
each_variant = pytest.mark.parametrize(("family", "changes"), VARIANTS.values(), ids=list(VARIANTS))
each_family = pytest.mark.parametrize("family", ["dit", "sit", "latte"])


def baked_model(
    model: DynamicTransformer, steps: int = 4, sampler: str | None = None
) -> tuple[DynamicTransformer, list[float]]:
    """A model's baked form, and the timesteps that it serves."""
    schedule = schedule_of(model, steps, sampler)
    return bake(model, schedule, decided(model, schedule), torch.float32), schedule.timesteps


@each_variant
@pytest.mark.parametrize("execution", ["dense", "compact"])
@torch.no_grad()
def test_it_computes_what_the_dynamic_model_does(
    family: str, changes: dict[str, object], execution: str
) -> None:
    model = tiny_model(family, **changes)
    baked, times = baked_model(model)
    sample, _, labels = tiny_inputs(model, 2)
    widths = set()
    for t in times:
        for each in (model, baked):
            each.set_execution(execution)
        expected, routing = model.denoise(sample, t, labels)
        found, decisions = baked.denoise(sample, t, labels)
        assert torch.equal(found, expected)
        assert torch.equal(decisions.heads, routing.heads)
        assert torch.equal(decisions.groups, routing.groups)
        assert torch.equal(decisions.tokens, routing.tokens)
        widths.add((*routing.heads.flatten().tolist(), *routing.groups.flatten().tolist()))
    assert len(widths) > 1


@each_family
@torch.no_grad()
def test_mixed_timesteps_plans_and_the_dial_of_the_tokens(family: str) -> None:
    model = tiny_model(family)
    baked, times = baked_model(model)
    sample, _, labels = tiny_inputs(model, len(times))
    mixed = torch.tensor(times)
    for each in (model, baked):
        each.set_execution("compact")
    assert torch.equal(baked(sample, mixed, labels).sample, model(sample, mixed, labels).sample)
    plan = baked.plan(mixed, labels.tolist())
    assert torch.allclose(baked(sample, mixed, labels).sample, model(sample, mixed, labels).sample, atol=1e-5)
    assert plan.hits == 1
    before, moved = (baked.denoise(sample, mixed, labels, gating=ThresholdGating(k))[1] for k in (0.0, -9.0))
    assert torch.equal(before.heads, moved.heads)
    assert moved.tokens.sum() < before.tokens.sum()


@each_family
def test_the_multiplications_are_those_of_the_dynamic_model_without_width_routers(family: str) -> None:
    model = tiny_model(family)
    baked, times = baked_model(model)
    sample, _, labels = tiny_inputs(model, 1)
    for t in times[:3]:
        inputs = (sample, torch.tensor([t]), labels)
        _, routing = model.denoise(sample, t, labels)
        dynamic, counted = count_compact(model, routing, *inputs), count_compact(baked, routing, *inputs)
        assert counted.deviation < 1e-6
        geometry = model.geometry
        rows = geometry.num_heads + geometry.num_groups - 2
        assert dynamic.torch - counted.torch == pytest.approx(geometry.depth * geometry.hidden_size * rows)
        assert macs_of(baked.geometry, routing).routed == macs_of(geometry, routing).routed
        assert torch.equal(executed_ratio(routing, baked.geometry), executed_ratio(routing, geometry))


@torch.no_grad()
def test_other_timesteps_are_an_error_that_names_the_baked_ones() -> None:
    for family, given, shown in (("dit", 998.0, "999, 749, 499, 249"), ("sit", 0.3, "0, 0.25, 0.5, 0.75")):
        baked, _ = baked_model(tiny_model(family))
        inputs = tiny_inputs(baked, 1)
        for execution in ("dense", "compact"):
            baked.set_execution(execution)
            with pytest.raises(DyditError, match=f"baked for the timestep {given:g}") as raised:
                baked(inputs[0], given, inputs[2])
            assert shown in str(raised.value)
        with pytest.raises(DyditError, match="baked for the timestep"):
            baked.plan([given])
        with pytest.raises(DyditError, match="baked for the timestep"):
            baked.routing(given)
        # The complete model has no use for widths.
        baked.set_execution("static")
        baked(inputs[0], given, inputs[2])
        assert baked.denoise(*inputs, gating=CompleteGating())[1].heads.all()


def test_a_profile_which_asks_at_other_timesteps_is_refused_before_it_begins() -> None:
    baked, _ = baked_model(tiny_model())
    with pytest.raises(DyditError, match="A profile looks at timesteps that are not in their table"):
        profile(baked)


def test_what_is_fixed_stays(tmp_path: Path) -> None:
    baked, _ = baked_model(tiny_model("dit", **BUDGETS))
    assert baked.set_budget(0.6) is baked
    with pytest.raises(DyditError, match=r"budget of 0\.6"):
        baked.set_budget(0.9)
    exported(trained(tmp_path / "t", in_channels=1), tmp_path / "e", "baked", steps=3)
    with pytest.raises(DyditError, match="cannot be fine-tuned"):
        load_for_training(tmp_path / "e")
    found = inspect(tmp_path / "e")
    assert found.routers is not None
    assert found.routers.baked_steps == 3
    assert found.next is not None
    assert "--steps 3" in found.next
    for kind in ("diffusers", "original", "baked", "pruned"):
        options = {"timestep": 999.0} if kind == "pruned" else {}
        with pytest.raises(DyditError, match="baked already"):
            exported(tmp_path / "e", tmp_path / "again", kind, **options)
    exported(tmp_path / "e", tmp_path / "static", "static")
    (file,) = (tmp_path / "static").glob("model.*")
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    assert not [key for key in tensors if "baked" in key or "router" in key]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1001}, "1001 steps"),
        ({"sampler": "euler"}, "sampler 'euler'"),
        ({"timestep": 3.0}, "takes no --timestep"),
        ({"pipeline": "x"}, "takes no --pipeline"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DyditError, match=message):
        exported(trained(tmp_path / "t", in_channels=1), tmp_path / "e", "baked", **settings)
    assert not (tmp_path / "e").exists()


def test_a_sampler_that_chooses_its_steps_and_a_family_without_a_list(tmp_path: Path) -> None:
    with pytest.raises(DyditError, match="not known before"):
        exported(trained(tmp_path / "t", "sit", in_channels=1), tmp_path / "e", "baked", sampler="dopri5")
    with pytest.raises(DyditError, match="does not take a FLUX"):
        exported(trained(tmp_path / "f", "flux"), tmp_path / "e", "baked")


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_the_folder_in_the_stock_pipeline_without_the_package(family: str, tmp_path: Path) -> None:
    """The same images, bit for bit, as the dynamic export; and another number of steps is refused."""
    model = trained(tmp_path / "t", family, in_channels=1)
    exported(model, tmp_path / "dynamic")
    report = exported(model, tmp_path / "e", "baked", steps=5)
    # Bit for bit on processors whose products round alike for any number of rows (Intel's here); on an AMD EPYC 2.6e-6.
    assert report.max_difference <= 1e-5
    assert "9 timesteps" in report.verified or "10 timesteps" in report.verified
    script = f"""
import torch
from diffusers import DiTPipeline
images = []
for name in ("dynamic", "e"):
    pipeline = DiTPipeline.from_pretrained(name, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    images.append(pipeline(
        class_labels={CLASSES}, guidance_scale={GUIDANCE}, num_inference_steps=5,
        generator=torch.Generator().manual_seed(0), output_type="pt",
    ).images)
assert torch.equal(*images)
assert not [key for key in pipeline.transformer.state_dict() if "head_router" in key or "channel_router" in key]
try:
    pipeline(class_labels={CLASSES}, num_inference_steps=7)
except Exception as error:
    print(error)
assert "dydit_cli" not in sys.modules
"""
    assert "999, 799, 599, 399, 199" in run(script, tmp_path)


def test_the_card_s_code_runs_and_says_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(trained(tmp_path / "t", in_channels=1), tmp_path / "e", "baked", steps=3)
    card = (tmp_path / "e" / "README.md").read_text(encoding="utf-8")
    assert "3 sampling steps" in card
    assert "999, 666, 332" in card
    assert "cannot be fine-tuned" in card
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        if "trust_remote_code" not in code:
            exec(compile(code, "card", "exec"), {})


def test_the_card_of_a_latte_draws_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(trained(tmp_path / "t", "latte"), tmp_path / "e", "baked", steps=3)
    card = (tmp_path / "e" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    ours, _ = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "set_timesteps(3)" in ours
    names: dict[str, torch.Tensor] = {}
    exec(compile(ours, "card", "exec"), names)
    assert names["videos"].isfinite().all()


def test_dydit_sample_runs_it(tmp_path: Path) -> None:
    model = trained(tmp_path / "t", "sit", in_channels=1)
    exported(model, tmp_path / "e", "baked", steps=3, sampler="heun")
    found = []
    for name in ("t", "e"):
        out = tmp_path / f"s_{name}"
        sample(tmp_path / name, out, steps=3, sampler="heun", num_images=2)
        with np.load(out / "samples.npz") as file:
            found.append(file[file.files[0]])
    assert np.array_equal(*found)


def test_a_budget_decides_the_widths_and_types_are_kept(tmp_path: Path) -> None:
    model = trained(tmp_path / "t", in_channels=1, **BUDGETS)
    exported(model, tmp_path / "e", "baked", steps=3, budget=0.9, dtype="bfloat16")
    config = json.loads((tmp_path / "e" / "transformer" / "config.json").read_text(encoding="utf-8"))
    assert config["default_budget"] == 0.9
    tensors = load_file(next((tmp_path / "e" / "transformer").glob("*.safetensors")))
    assert tensors["blocks.0.attn.qkv.weight"].dtype == torch.bfloat16
    assert tensors["baked_widths.heads"].dtype == torch.bool
    baked = load_model(tmp_path / "e")
    t = baked.baked_widths.timesteps[0]
    told = load_model(model, torch_dtype=torch.bfloat16, budget=0.9).float().routing(t)
    assert torch.equal(baked.routing(t).heads, told.heads)
    assert not torch.equal(told.heads, load_model(model).routing(t).heads)
