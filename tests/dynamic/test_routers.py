"""Routers: the paper's start, fp32 logits whatever the dtype, and the always-on unit."""

from __future__ import annotations

import math

import pytest
import torch

from dydit_cli.dynamic.layers import DynamicAttention, DynamicMlp
from dydit_cli.dynamic.routers import (
    ChannelRouter,
    HeadRouter,
    OrderedChannelRouter,
    OrderedHeadRouter,
    TokenRouter,
    WidthRouter,
    keep_everything,
    shift_routers,
    width_routers,
)
from dydit_cli.errors import DyditError


@pytest.mark.parametrize("kind", [HeadRouter, ChannelRouter])
@pytest.mark.parametrize(("always_on", "rows"), [(True, 5), (False, 6)])
def test_width_routers_start_with_everything_on(kind: type[WidthRouter], always_on: bool, rows: int) -> None:
    router = kind(48, 6, always_on)
    router.reset_parameters()
    assert router.linear.weight.shape == (rows, 48)
    assert (router.linear.bias == 15.0).all()
    assert router.linear.weight.abs().max() <= (6 / (48 + rows)) ** 0.5
    logits = router(torch.randn(4, 48))
    assert logits.shape == (4, rows)
    mask = router.complete((logits > 0).float())
    assert mask.shape == (4, 6)
    assert mask.all()


@pytest.mark.parametrize("kind", [OrderedHeadRouter, OrderedChannelRouter])
@pytest.mark.parametrize(("always_on", "routed"), [(True, 5), (False, 6)])
def test_ordered_routers_start_with_everything_on(
    kind: type[WidthRouter], always_on: bool, routed: int
) -> None:
    router = kind(48, 6, always_on)
    router.reset_parameters()
    assert router.linear.weight.shape == (routed + 1, 48)
    logits = router(torch.randn(4, 48))
    # A logit apart, the last at the free routers' start.
    expected = 15.0 + torch.arange(routed - 1, -1, -1)
    torch.testing.assert_close(logits, expected.expand(4, -1))
    assert router.complete((logits > 0).float()).shape == (4, 6)


def test_ordered_logits_descend_by_the_formula() -> None:
    router = OrderedHeadRouter(48, 6, always_on=True)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    embedding = torch.randn(8, 48, generator=torch.Generator().manual_seed(2))
    logits, values = router(embedding).detach(), router.linear(embedding).detach()
    for sample in range(8):
        for unit in range(5):
            gaps = sum(math.log1p(math.exp(float(values[sample, 1 + j]))) for j in range(unit + 1))
            assert float(logits[sample, unit]) == pytest.approx(float(values[sample, 0]) - gaps, abs=1e-4)
    assert (logits[:, 1:] <= logits[:, :-1]).all()


@pytest.mark.parametrize("kind", [HeadRouter, OrderedHeadRouter, TokenRouter])
def test_a_shift_moves_all_logits(kind: type[WidthRouter] | type[TokenRouter]) -> None:
    router = kind(48) if kind is TokenRouter else kind(48, 6, True)
    router.reset_parameters()
    inputs = torch.randn(2, 16, 48) if kind is TokenRouter else torch.randn(2, 48)
    before = router(inputs)
    shift_routers(torch.nn.ModuleDict({"any_router": router}), -0.5)
    torch.testing.assert_close(router(inputs), before - 0.5)


@pytest.mark.parametrize("kind", [HeadRouter, OrderedHeadRouter, TokenRouter])
def test_a_router_that_keeps_everything_does_so_whatever_it_is_shown(
    kind: type[WidthRouter] | type[TokenRouter],
) -> None:
    router = kind(48) if kind is TokenRouter else kind(48, 6, True)
    router.reset_parameters()
    inputs = 1e4 * (torch.randn(2, 16, 48) if kind is TokenRouter else torch.randn(2, 48))
    if kind is not OrderedHeadRouter:
        assert (router(inputs) < 0).any(), "a start with weights is outgrown"
    keep_everything(torch.nn.ModuleDict({"any_router": router}))
    assert (router(inputs) > 0).all()


def test_an_unknown_width_is_refused_with_the_nearest() -> None:
    with pytest.raises(DyditError, match="orderd") as refusal:
        width_routers("orderd")
    assert "ordered" in refusal.value.fix


def test_token_router_starts_with_everything_kept() -> None:
    router = TokenRouter(48)
    router.reset_parameters()
    assert router.reduce.weight.shape == (3, 48)
    assert (router.score.bias == 35.0).all()
    assert not router.reduce.bias.any()
    assert (router(torch.randn(2, 16, 48)) > 0).all()


@pytest.mark.parametrize("hidden", [8, 15, 48])
def test_token_router_of_a_narrow_model_has_an_inner_channel(hidden: int) -> None:
    assert TokenRouter(hidden)(torch.randn(1, 4, hidden)).shape == (1, 4)


def test_an_always_on_unit_is_put_in_front_once() -> None:
    router = HeadRouter(48, 4, always_on=True)
    mask = torch.tensor([[0.0, 1.0, 0.0]])
    assert router.complete(mask).tolist() == [[1, 0, 1, 0]]
    assert router.complete(torch.zeros(1, 4)).tolist() == [[0, 0, 0, 0]]
    older = HeadRouter(48, 4, always_on=False)
    assert older.complete(torch.zeros(1, 4)).tolist() == [[0, 0, 0, 0]]


def test_a_single_unit_has_no_rows_and_is_on() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        router = ChannelRouter(48, 1, always_on=True)
    router.reset_parameters()
    logits = router(torch.randn(3, 48))
    assert logits.shape == (3, 0)
    assert router.complete((logits > 0).float()).tolist() == [[1], [1], [1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_fp32_from_fp32_arithmetic(dtype: torch.dtype) -> None:
    """The decision is the one of the stored values in fp32: rounding the product would move it."""
    width, tokens = HeadRouter(48, 6, True).to(dtype), TokenRouter(48).to(dtype)
    embedding, stream = torch.randn(3, 48).to(dtype), torch.randn(2, 16, 48).to(dtype)
    expected = embedding.float() @ width.linear.weight.float().T + width.linear.bias.float()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, scores = width(embedding), tokens(stream)
        assert logits.dtype == scores.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_masks_by_rank_become_masks_by_stored_unit() -> None:
    attention, mlp = DynamicAttention(8, 4), DynamicMlp(8, 8, 4)
    attention.head_order.copy_(torch.tensor([2, 0, 3, 1]))
    # Ranks 0 and 1 are the stored heads 2 and 0.
    assert attention.by_source(torch.tensor([[1.0, 1.0, 0.0, 0.0]])).tolist() == [[1, 0, 1, 0]]
    mlp.channel_order.copy_(torch.tensor([7, 0, 1, 6, 2, 5, 3, 4]))
    assert mlp.by_source(torch.tensor([[1.0, 0.0, 0.0, 1.0]])).tolist() == [[1, 0, 0, 1, 1, 0, 0, 1]]


def test_gradients_pass_through_the_order() -> None:
    attention = DynamicAttention(8, 4)
    attention.head_order.copy_(torch.tensor([2, 0, 3, 1]))
    mask = torch.ones(1, 4, requires_grad=True)
    (attention.by_source(mask) * torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    assert mask.grad.tolist() == [[3, 1, 4, 2]]
