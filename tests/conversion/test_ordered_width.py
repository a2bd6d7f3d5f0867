"""`convert --width ordered` for the families of texts: everything on at the start, one count of units a block and kind."""

from __future__ import annotations

from pathlib import Path

import torch

from dydit_cli.artifacts import load_model
from dydit_cli.conversion.convert import convert
from dydit_cli.dynamic.routers import OrderedChannelRouter, OrderedHeadRouter
from tests.families.latte_t2v import stock_model


def test_flux(tmp_path: Path) -> None:
    report = convert("builtin:flux_fmnist", out=tmp_path / "c", width="ordered")
    assert report.verification.dense == 0
    assert report.verification.switched_on == 1
    model = load_model(tmp_path / "c")
    assert model.geometry.ordered_width
    block = model.transformer_blocks[0]
    assert isinstance(block.head_router, OrderedHeadRouter)
    assert isinstance(block.channel_router, OrderedChannelRouter)
    assert isinstance(block.context_channel_router, OrderedChannelRouter)
    assert isinstance(model.single_transformer_blocks[0].channel_router, OrderedChannelRouter)
    # A unit apart, the last at 15: turning the dial drops the least important first, in both streams.
    routing = model.set_keep_bias(-16.5).routing(torch.tensor([0.5]))
    for mask in (routing.blocks[0].heads, routing.blocks[0].groups, routing.blocks[0].context_groups):
        assert mask is not None
        assert mask.tolist() == [[1, 1, 0, 0]]


def test_text_to_video_latte(tmp_path: Path) -> None:
    stock_model().save_pretrained(str(tmp_path / "stock"))
    report = convert(tmp_path / "stock", out=tmp_path / "c", width="ordered")
    assert report.verification.dense == 0
    assert report.verification.switched_on == 1
    model = load_model(tmp_path / "c")
    for block in model.dynamic_blocks:
        assert isinstance(block.head_router, OrderedHeadRouter)
        assert isinstance(block.channel_router, OrderedChannelRouter)
