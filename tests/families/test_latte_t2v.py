"""The text-to-video Latte against diffusers' own class, and what it has beyond it."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import LatteTransformer3DModel

from dydit_cli.dynamic.gates import CompleteGating, ImposedGating
from dydit_cli.errors import DyditError
from dydit_cli.execution import CompactExecutor, DenseExecutor
from dydit_cli.families.prompt_condition import PromptCondition
from dydit_cli.flops import count_macs
from dydit_cli.profiling.counting import count_compact, count_static
from tests.families.latte_t2v import CONFIG, arguments, dynamic_model, stock_model
from tests.tiny import bits, random_routing, relative_difference

FRAMES, PLACES = CONFIG["video_length"], 16


def masks(kind: str, batch: int, frames: int) -> torch.Tensor | None:
    """A prompt's mask of a kind that diffusers' class takes, with a row for every frame."""
    keep = torch.rand(batch * frames, 6, generator=torch.Generator().manual_seed(7)) < 0.6
    keep[:, 0] = True
    kinds = {
        "none": None,
        "bool": keep,
        "added": torch.where(keep, 0.0, -10000.0),
        "added, three axes": torch.where(keep, 0.0, -10000.0)[:, None],
    }
    return kinds[kind]


@pytest.mark.parametrize(
    ("frames", "temporal", "mask"),
    [
        (FRAMES, True, "none"),
        (FRAMES, True, "bool"),
        (FRAMES, True, "added"),
        (FRAMES, False, "added, three axes"),
        (1, True, "bool"),
        (5, False, "none"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_it_is_diffusers_class_bit_for_bit(
    dtype: torch.dtype, frames: int, temporal: bool, mask: str
) -> None:
    """Static and all-on dense; a fresh compact model within rounding. Every keyword of the stock forward."""
    stock = stock_model()
    dynamic = dynamic_model(stock).to(dtype)
    sample, timestep, prompts = arguments(2, frames)
    given = {
        "hidden_states": sample.to(dtype),
        "timestep": timestep,
        "encoder_hidden_states": prompts.to(dtype),
        "encoder_attention_mask": masks(mask, 2, frames),
        "enable_temporal_attentions": temporal,
    }
    if given["encoder_attention_mask"] is not None and mask != "bool":
        given["encoder_attention_mask"] = given["encoder_attention_mask"].to(dtype)
    expected = stock.to(dtype)(**given, return_dict=False)[0]
    for execution in ("static", "dense"):
        actual = dynamic.set_execution(execution)(**given).sample
        assert torch.equal(bits(actual), bits(expected)), execution
    compact = dynamic.set_execution("compact")(**given, return_dict=False)[0]
    assert relative_difference(compact, expected) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_the_keywords_are_diffusers_own() -> None:
    ours = inspect.signature(dynamic_model(stock_model()).forward).parameters
    assert list(ours) == list(inspect.signature(LatteTransformer3DModel.forward).parameters)[1:]


@torch.no_grad()
def test_without_biases_of_queries_keys_and_values() -> None:
    stock = stock_model(attention_bias=False)
    sample, timestep, prompts = arguments()
    expected = stock(sample, timestep, prompts).sample
    dynamic = dynamic_model(stock)
    assert torch.equal(
        bits(dynamic.set_execution("static")(sample, timestep, prompts).sample), bits(expected)
    )
    compact = dynamic.set_execution("compact")(sample, timestep, prompts).sample
    assert relative_difference(compact, expected) < 1e-5


@torch.no_grad()
def test_a_mask_a_video_is_the_mask_of_its_frames() -> None:
    """diffusers documents (B, L) and takes (B * F, L) alone; both pass here, and so do whole numbers."""
    model = dynamic_model(stock_model())
    sample, timestep, prompts = arguments()
    keep = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]])
    expected = model(sample, timestep, prompts, keep.bool().repeat_interleave(FRAMES, 0)).sample
    for mask in (keep, keep.bool(), keep[:, None]):
        assert torch.equal(model(sample, timestep, prompts, mask).sample, expected)
    assert not torch.equal(model(sample, timestep, prompts).sample, expected)
    with pytest.raises(DyditError, match=r"does not fit 2 videos of 3 frames"):
        model(sample, timestep, prompts, keep[:1])


@pytest.mark.parametrize("frames", [FRAMES, 1])
@torch.no_grad()
def test_compact_agrees_with_dense(frames: int) -> None:
    """With half of everything off, with masks and without temporal blocks too."""
    model = dynamic_model(stock_model(), balanced=True)
    sample, timestep, prompts = arguments(3, frames)
    keep = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    condition = PromptCondition(prompts, keep | (torch.arange(6) == 0))
    for temporal in (True, False):
        dense, routing = model.denoise(
            sample, timestep, condition, executor=DenseExecutor(), enable_temporal_attentions=temporal
        )
        compact, _ = model.denoise(
            sample,
            timestep,
            condition,
            executor=CompactExecutor(),
            gating=ImposedGating(routing),
            enable_temporal_attentions=temporal,
        )
        assert relative_difference(compact, dense) < 1e-5
        shares = [float(block.tokens.mean()) for block in routing.blocks]
        assert all(share == 0 for share in shares[1::2]) != temporal
        assert 0.1 < sum(shares[::2]) / 2 < 0.9


@torch.no_grad()
def test_cross_attention_and_what_is_always_on_stay() -> None:
    """With nothing routed on, the prompt still has its say, and biases stay."""
    model = dynamic_model(stock_model())
    sample, timestep, prompts = arguments()
    nothing = random_routing(model.geometry, 2, keep=0.0)
    first, _ = model.denoise(sample, timestep, PromptCondition(prompts), gating=ImposedGating(nothing))
    second, _ = model.denoise(sample, timestep, PromptCondition(-prompts), gating=ImposedGating(nothing))
    assert relative_difference(first, second) > 1e-2


@torch.no_grad()
def test_widths_know_nothing_of_the_prompt() -> None:
    model = dynamic_model(stock_model(), balanced=True)
    sample, timestep, prompts = arguments()
    _, first = model.denoise(sample, timestep, PromptCondition(prompts))
    _, second = model.denoise(sample, timestep, PromptCondition(-prompts))
    assert torch.equal(first.heads, second.heads)
    assert torch.equal(first.groups, second.groups)
    assert not torch.equal(first.tokens, second.tokens)
    assert torch.equal(model.routing(timestep).heads, first.heads)


@torch.no_grad()
def test_weights_that_changed_are_packed_again() -> None:
    model = dynamic_model(stock_model(), balanced=True).set_execution("compact")
    sample, timestep, prompts = arguments()
    model.plan(timestep)
    before = model(sample, timestep, prompts).sample
    for layer in ("attn1.to_v", "ff.net.0.proj"):
        model.temporal_transformer_blocks[0].get_submodule(layer).weight.mul_(1.5)
        after = model(sample, timestep, prompts).sample
        dense = model.set_execution("dense")(sample, timestep, prompts).sample
        assert relative_difference(after, dense) < 1e-5
        assert relative_difference(after, before) > 1e-4
        model.set_execution("compact")
        before = model(sample, timestep, prompts).sample


@torch.no_grad()
def test_fvcore_counts_the_formula_at_the_published_width() -> None:
    """Latte-1's width and prompts, one pair of blocks and smaller frames: every term is there, cross-attention as a part of its own."""
    stock = stock_model(
        num_attention_heads=16, attention_head_dim=72, num_layers=1, sample_size=16, video_length=2,
        caption_channels=4096,
    )  # fmt: skip
    model = dynamic_model(stock)
    sample, condition = model.example_inputs(1, 0)
    static = count_static(model, sample, torch.tensor([500]), condition)
    assert static.deviation < 1e-3
    routing = random_routing(model.geometry, 1)
    assert count_compact(model, routing, sample, torch.tensor([500]), condition).deviation < 1e-3
    report = count_macs(model)
    tokens, text, width = 2 * 64, 6, 1152
    assert report.cross_attention == 2 * (tokens + text) * width**2 + 2 * tokens * text * width
    assert report.attention == 2 * 4 * tokens * width**2 + 2 * tokens * (64 + 2) * width
    assert report.modulation == 6 * width**2


def test_the_published_model_has_its_parameters() -> None:
    from dydit_cli.families.registry import preset_named

    family, config = preset_named("latte-t2v-1")
    with torch.device("meta"):
        model = family.build(config)
    static = sum(parameter.numel() for parameter in model.backbone_parameters())
    assert static == 1_057_246_880
    source = [key for key in model.state_dict() if "_router." not in key and not key.endswith("_order")]
    assert len(source) == 967
    assert model.geometry.num_tokens == 16 * 32 * 32


@torch.no_grad()
def test_errors_say_what_to_do() -> None:
    model = dynamic_model(stock_model())
    sample, timestep, prompts = arguments()
    for wrong in (sample[:, :3], sample[..., :6], sample[:, :, :2], sample[0]):
        with pytest.raises(DyditError, match=r"expects inputs of 4x3x8x8"):
            model(wrong, timestep, prompts)
    with pytest.raises(DyditError, match="timestep and prompt embeddings"):
        model(sample, timestep)
    with pytest.raises(DyditError, match="not compiled"):
        model.set_execution("compact", compile=True)
    with pytest.raises(DyditError, match="takes no labels"):
        model.plan([1, 2], [0])


@torch.no_grad()
def test_a_skipped_temporal_block_reports_nothing() -> None:
    model = dynamic_model(stock_model())
    sample, timestep, prompts = arguments()
    _, routing = model.denoise(
        sample, timestep, PromptCondition(prompts), gating=CompleteGating(), enable_temporal_attentions=False
    )
    assert [bool(block.heads.all()) for block in routing.blocks] == [True, False, True, False]
    assert not routing.groups[:, 1::2].any()
    assert routing.tokens.shape == (2, 4, FRAMES * PLACES)
