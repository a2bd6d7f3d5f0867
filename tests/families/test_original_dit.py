"""Geometry and keys of original files: what is inferred, what is asked for, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dydit_cli.conversion.insertion import build_from
from dydit_cli.errors import DyditError
from dydit_cli.families import original_dit
from dydit_cli.families.family import Hints
from dydit_cli.families.registry import DIT, FAMILIES, SIT, family_named, preset_named
from tests.tiny import tiny_model

SIX = Hints(num_heads=6)


def static_file(**changes: Any) -> dict[str, Tensor]:
    state = tiny_model(**changes).state_dict()
    return {
        key: tensor for key, tensor in state.items() if "_router." not in key and not key.endswith("_order")
    }


def authors_file(**changes: Any) -> dict[str, Tensor]:
    """The authors' dynamic form: their router names, and no orders."""
    written = DIT.write(tiny_model(**changes).state_dict())
    return {key: tensor for key, tensor in written.items() if not key.endswith("_order")}


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_heads_of_published_widths(width: int, heads: int) -> None:
    with torch.device("meta"):
        model = DIT.build({"hidden_size": width, "num_attention_heads": heads, "num_layers": 1})
    static = {key: value for key, value in model.state_dict().items() if "_router." not in key}
    assert DIT.read(static, Hints()).config["num_attention_heads"] == heads


def test_heads_of_another_width_are_asked_for() -> None:
    with pytest.raises(DyditError, match="--num-heads") as error:
        DIT.read(static_file(), Hints())
    assert "48 channels" in error.value.what


def test_heads_that_do_not_divide_name_the_divisors() -> None:
    with pytest.raises(DyditError, match="do not divide") as error:
        DIT.build(DIT.read(static_file(), Hints(num_heads=5)).config)
    assert "3, 4, 6, 8" in error.value.why


def test_groups_that_do_not_divide_name_the_divisors() -> None:
    with pytest.raises(DyditError, match="channel groups do not divide") as error:
        DIT.build(DIT.read(static_file(), Hints(num_heads=6, num_groups=7)).config)
    assert "6, 8" in error.value.why


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn_sigma": False},
        {"patch_size": 4},
        {"in_channels": 1},
        {"num_layers": 1},
        {"mlp_hidden_size": 96},
        {"num_classes": 1},
        {"sample_size": 12, "patch_size": 3},
    ],
)
def test_geometry_is_read_from_the_tensors(changes: dict[str, Any]) -> None:
    expected = tiny_model(**changes).geometry
    assert DIT.build(DIT.read(static_file(**changes), SIX).config).geometry == expected


def test_a_file_of_ten_blocks_counts_to_ten() -> None:
    """As numbers, not as text."""
    assert DIT.read(static_file(num_layers=11), SIX).config["num_layers"] == 11


def test_sit_is_not_mistaken_for_the_authors_dynamic_dit() -> None:
    assert DIT.recognises(static_file())
    assert SIT.recognises(static_file())
    assert DIT.recognises(authors_file())
    assert not SIT.recognises(authors_file())
    assert all(family.recognises(family.write(tiny_model(family).state_dict())) for family in FAMILIES)


def test_other_layouts_are_not_recognised() -> None:
    assert not original_dit.recognises({})
    assert not original_dit.recognises({"transformer_blocks.0.attn1.to_q.weight": torch.ones(1)})
    assert not original_dit.recognises(static_file() | {"temp_embed": torch.zeros(1, 4, 48)})


class TestAuthorsRouters:
    @pytest.mark.parametrize("always_on", [True, False])
    def test_rows_tell_whether_a_unit_is_always_on(self, always_on: bool) -> None:
        source = DIT.read(authors_file(always_on=always_on), SIX)
        assert source.dynamic
        assert source.config["always_on"] is always_on
        assert source.config["num_groups"] == 6

    @pytest.mark.parametrize("heads", [3, 4, 8, 12])
    def test_the_wrong_number_of_heads_is_told_from_the_rows(self, heads: int) -> None:
        with pytest.raises(DyditError, match="--num-heads 6"):
            DIT.read(authors_file(), Hints(num_heads=heads))

    def test_other_groups_than_the_routers_are_refused(self) -> None:
        with pytest.raises(DyditError, match="6 channel groups, not 4"):
            DIT.read(authors_file(), Hints(num_heads=6, num_groups=4))
        assert DIT.read(authors_file(), Hints(num_heads=6, num_groups=6)).config["num_groups"] == 6

    def test_names_are_the_authors(self) -> None:
        assert {key for key in authors_file() if key.startswith("blocks.0.") and "adaLN" not in key} >= {
            f"blocks.0.{layer}.{kind}"
            for layer in (
                "attn_rate.router",
                "mlp_rate.router",
                "token_selection.mlp_head.0",
                "token_selection.mlp_head.2",
            )
            for kind in ("weight", "bias")
        }


class TestWrongShapes:
    @pytest.mark.parametrize("key", ["pos_embed", *original_dit.TEMPLATE_KEYS])
    @pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 0, 48), (1, 2, 3, 4, 5)])
    def test_a_tensor_that_tells_the_geometry(self, key: str, shape: tuple[int, ...]) -> None:
        """Refused when it is read, or when the model made from it is compared with it; never another error."""
        with pytest.raises(DyditError):
            build_from(DIT, DIT.read(static_file() | {key: torch.zeros(shape)}, SIX), seed=0)

    def test_a_table_that_is_no_square(self) -> None:
        with pytest.raises(DyditError, match="15 entries"):
            DIT.read(static_file() | {"pos_embed": torch.zeros(1, 15, 48)}, SIX)

    def test_no_table(self) -> None:
        tensors = static_file()
        del tensors["pos_embed"]
        with pytest.raises(DyditError, match="no position table"):
            DIT.read(tensors, SIX)

    @pytest.mark.parametrize("number", [4, 1_000_000_000])
    def test_blocks_with_gaps(self, number: int) -> None:
        """The highest number alone must not decide how large a model is built."""
        with pytest.raises(DyditError, match="block"):
            DIT.read(static_file() | {f"blocks.{number}.attn.qkv.weight": torch.zeros(1)}, SIX)


class TestRegistry:
    def test_unknown_family(self) -> None:
        with pytest.raises(DyditError, match="did you mean 'sit'"):
            family_named("sitt")

    def test_presets(self) -> None:
        family, config = preset_named("DiT-XL/2")
        assert family is DIT
        assert config["num_layers"] == 28
        config["num_layers"] = 1
        assert preset_named("dit-xl/2")[1]["num_layers"] == 28
        assert preset_named("sit-b/4-512")[1]["sample_size"] == 64
        with pytest.raises(DyditError, match="did you mean 'dit-xl/"):
            preset_named("dit-xl/3")
