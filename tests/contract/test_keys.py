"""The stored layout: the source's keys and shapes in the source's order, routers and orders beside them, and nothing else."""

from __future__ import annotations

import re

import pytest
import torch

from dydit_cli.families.family import Family, Hints
from tests.tiny import each_family, each_labelled_family, predict, tiny_inputs, tiny_model

OURS = re.compile(
    r"blocks\.\d+\.(head_router|channel_router|token_router|attn\.head_order|mlp\.channel_order)"
)
# What an original file of DiT or SiT holds of each block.
BLOCK_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
OTHER_LAYERS = (
    "x_embedder.proj",
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
)


@each_labelled_family
def test_state_dict_is_source_plus_routers_plus_orders(family: Family) -> None:
    model = tiny_model(family)
    depth = model.geometry.depth
    source = {"pos_embed", "y_embedder.embedding_table.weight"}
    source |= {"temp_embed"} if model.geometry.num_frames else set()
    source |= {f"{layer}.{kind}" for layer in OTHER_LAYERS for kind in ("weight", "bias")}
    source |= {
        f"blocks.{i}.{layer}.{kind}"
        for i in range(depth)
        for layer in BLOCK_LAYERS
        for kind in ("weight", "bias")
    }
    keys = set(model.state_dict())
    assert {key for key in keys if not OURS.match(key)} == source
    assert len(keys - source) == depth * (8 + 2)


@each_family
@pytest.mark.parametrize("execution", ["dense", "compact"])
@torch.no_grad()
def test_running_leaves_the_state_dict_as_it_was(family: Family, execution: str) -> None:
    """What compact execution packs is its own; no key appears, and no weight moves."""
    model = tiny_model(family)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.set_execution(execution).plan([0.25, 0.5])
    sample, _, condition = tiny_inputs(model, 2)
    predict(model, sample, 0.25, condition)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@each_labelled_family
@pytest.mark.parametrize("always_on", [True, False])
@pytest.mark.parametrize("num_groups", [None, 4])
def test_the_key_map_is_a_bijection(family: Family, always_on: bool, num_groups: int | None) -> None:
    """Written in the original layout and read back, every tensor returns to its key; the configuration is the same."""
    model = tiny_model(family, always_on=always_on, num_groups=num_groups)
    state = model.state_dict()
    written = family.write(state)
    assert len(written) == len(state)
    assert sum("attn_rate.router" in key for key in written) == 2 * model.geometry.depth
    assert not any("_router." in key for key in written)
    assert family.recognises(written)
    source = family.read(written, Hints(num_heads=6))
    assert source.dynamic
    assert set(source.tensors) == set(state)
    assert all(source.tensors[key] is state[key] for key in state)
    again = family.build(source.config)
    again.load_state_dict(source.tensors)
    assert again.geometry == model.geometry


@each_labelled_family
def test_a_static_file_is_read_as_it_is(family: Family) -> None:
    model = tiny_model(family, num_groups=4, learn_sigma=False, patch_size=4, mlp_hidden_size=96)
    static = {key: tensor for key, tensor in model.state_dict().items() if not OURS.match(key)}
    source = family.read(static, Hints(num_heads=6, num_groups=4))
    assert not source.dynamic
    assert source.tensors == static
    assert family.build(source.config).geometry == model.geometry


@each_labelled_family
def test_presets_are_the_published_sizes(family: Family) -> None:
    """Configurations only: XL is not built."""
    for size, width in (("s", 384), ("b", 768), ("l", 1024), ("xl", 1152)):
        for patch in (2, 4, 8):
            preset = family.presets[f"{size}/{patch}"]
            assert preset["hidden_size"] == width
            assert preset["patch_size"] == patch
    with torch.device("meta"):
        model = family.build(family.presets["xl/2"])
    static = [p for name, p in model.named_parameters() if "_router." not in name and p.requires_grad]
    routers = sum(parameter.numel() for parameter in model.router_parameters())
    # DiT-XL/2's and SiT-XL/2's count; Latte-XL/2 has 101 classes for 1,000. 117,679 a block is the authors' routers'.
    expected = 673_799_072 if model.geometry.num_frames else 674_834_720
    assert sum(parameter.numel() for parameter in static) == expected
    assert routers == 28 * 117_679
