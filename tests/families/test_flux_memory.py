"""What diffusers and accelerate do to a model to save memory: each works in an execution, or says that it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import PyramidAttentionBroadcastConfig
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.families.flux import DyFluxTransformer2DModel
from tests.families.flux_pipelines import flux_pipeline, sampled
from tests.families.test_flux import forward_inputs
from tests.tiny import bits, relative_difference, tiny_model

CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize("execution", ["static", "dense", "compact"])


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def prepared(execution: str) -> tuple[DyFluxTransformer2DModel, dict[str, Any], Tensor]:
    """A model, keywords of its forward and what it predicts."""
    model = tiny_model("flux").set_execution(execution)
    keywords = forward_inputs(model)
    return model, keywords, model(**keywords).sample


@EVERY
def test_model_offload(execution: str) -> None:
    model, keywords, expected = prepared(execution)
    _, hook = cpu_offload_with_hook(model, execution_device=CPU)
    for _ in range(2):
        assert torch.equal(bits(model(**keywords).sample), bits(expected))
        hook.offload()


@EVERY
@pytest.mark.parametrize("buffers", [True, False])
def test_sequential_offload(execution: str, buffers: bool) -> None:
    model, keywords, expected = prepared(execution)
    cpu_offload(model, execution_device=CPU, offload_buffers=buffers)
    if execution == "static":
        assert torch.equal(bits(model(**keywords).sample), bits(expected))
        return
    with pytest.raises(DyditError, match="sequential offloading") as error:
        model(**keywords)
    assert "static" in error.value.fix


@EVERY
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(execution: str, kind: str) -> None:
    model, keywords, expected = prepared(execution)
    options = {"num_blocks_per_group": 2} if kind == "block_level" else {}
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **options)
    if execution != "compact":
        for _ in range(2):
            assert torch.equal(bits(model(**keywords).sample), bits(expected))
        return
    with pytest.raises(DyditError, match=r"group offloading|kept elsewhere|cannot slice"):
        model(**keywords)


@EVERY
def test_layerwise_casting(execution: str) -> None:
    model, keywords, expected = prepared(execution)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.single_transformer_blocks[0].proj_out.weight.dtype == torch.float8_e4m3fn
    assert {parameter.dtype for parameter in model.router_parameters()} == {torch.float32}
    if execution != "compact":
        assert 0 < relative_difference(model(**keywords).sample, expected) < 0.5
        return
    with pytest.raises(DyditError, match="cannot slice"):
        model(**keywords)


def test_caches_of_attention_and_single_files_are_refused() -> None:
    model = tiny_model("flux")
    with pytest.raises(DyditError, match="PyramidAttentionBroadcastConfig"):
        model.enable_cache(PyramidAttentionBroadcastConfig())
    assert not model.is_cache_enabled
    with pytest.raises(DyditError, match="dydit convert"):
        DyFluxTransformer2DModel.from_single_file("flux1-dev.safetensors")


def test_a_cache_context_is_harmless() -> None:
    """Pipelines enter one around every forward."""
    model, keywords, expected = prepared("compact")
    with model.cache_context("cond"):
        assert torch.equal(model(**keywords).sample, expected)


@EVERY
def test_two_pipelines_share_a_transformer(execution: str) -> None:
    model = tiny_model("flux").set_execution(execution)
    one, other = flux_pipeline(model), flux_pipeline(model)
    first, second = sampled(one), sampled(other, 24, 12)
    assert torch.equal(bits(sampled(other, 24, 12)), bits(second))
    assert torch.equal(bits(sampled(one)), bits(first))
