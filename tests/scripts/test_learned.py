"""What was learned: measured on a tiny model, and told of made-up decisions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dydit_cli.profiling.token_maps import TokenMaps
from scripts.learned import main, models_of
from scripts.reproduction.learned.decisions import Decisions, decisions_of, regions_of
from scripts.reproduction.learned.facts import facts_of, preference, spearman, trend
from scripts.reproduction.learned.page import page

LEVELS, DEPTH = 6, 2


def decisions(**changes: Any) -> Decisions:
    """A model that is the narrower the noisier, skips its second block in pure noise, and prefers the garment."""
    width = np.linspace(0.2, 1, LEVELS)[:, None].repeat(DEPTH, axis=1)
    tokens, narrowest = np.ones((LEVELS, DEPTH)), np.zeros((LEVELS, DEPTH), dtype=bool)
    tokens[:2, 1], narrowest[:3, 1] = 0, True
    maps = TokenMaps(
        torch.tensor([0.9, 0.1]),
        torch.tensor([900.0, 100.0]),
        torch.zeros(2, 1, 8, 8),
        torch.zeros(2, 2, 1, 8, 8),
        torch.ones(2, 2, DEPTH, 2, 2, dtype=torch.bool),
        (0, 1),
    )
    made: dict[str, Any] = {
        "name": "DiT, λ 0.5, seed 0",
        "family": "dit",
        "facts": {},
        "noise": np.linspace(1, 0, LEVELS),
        "heads": width,
        "groups": width,
        "tokens": tokens,
        "width": width,
        "macs": width * tokens,
        "narrowest": narrowest,
        "regions": np.tile([0.9, 0.8, 0.5], (LEVELS, 1)),
        "region_sizes": np.array([0.4, 0.2, 0.4]),
        "images": 10,
        "maps": maps,
    }
    return Decisions(**(made | changes))


def test_rank_correlation_knows_ties_and_what_never_changes() -> None:
    rising = np.arange(5.0)
    assert spearman(rising, rising**3) == pytest.approx(1)
    assert spearman(rising, -rising) == pytest.approx(-1)
    # Worked by hand: ranks 1 2 3 4 and 1.5 1.5 3.5 3.5.
    assert spearman(np.arange(4.0), np.array([0.0, 0, 1, 1])) == pytest.approx(2 / np.sqrt(5))
    assert spearman(rising, np.ones(5)) is None


def test_words_follow_from_numbers() -> None:
    assert "as in the paper" in trend(-0.9)
    assert "opposite" in trend(0.9)
    assert trend(0.2) == "no clear trend"
    assert trend(None) == "the same at all noise levels"
    assert preference(0.9, 0.5) == "garment kept more"
    assert preference(0.5, 0.9) == "background kept more"
    assert preference(0.52, 0.5) == "kept about alike"


def test_facts_of_decisions() -> None:
    facts = facts_of(decisions())
    assert facts.correlations["width"] == pytest.approx(-1)
    assert facts.block_trends == (2, 0, 0)
    assert facts.noisy["width"] == pytest.approx(0.28)
    assert facts.narrowest == pytest.approx(3 / 12)
    assert facts.no_tokens == pytest.approx(2 / 12)
    assert facts.skipped == pytest.approx(2 / 12)
    assert (facts.ever_skipped, facts.always_skipped) == ((1,), ())
    constant = facts_of(decisions(width=np.ones((LEVELS, DEPTH))))
    assert constant.correlations["width"] is None
    assert constant.block_trends == (0, 0, 2)


def test_the_page_says_the_opposite_of_the_opposite() -> None:
    narrow = decisions()
    wide = replace(narrow, name="other", width=narrow.width[::-1], regions=narrow.regions[:, ::-1])
    text = page([narrow], [(found, facts_of(found)) for found in (narrow, wide)], "python x")
    assert "narrower with more noise, as in the paper: 1 of 2 models; wider with more noise" in text
    assert "| DiT, λ 0.5, seed 0 | −1.00 |" in text
    assert "| garment kept more |" in text
    assert "| background kept more |" in text
    assert "| other | 25% | 17% | 17% | 2 | none |" in text
    assert "images/learned_tokens_dit.png" in text


def test_regions_of_an_image() -> None:
    image = torch.full((1, 1, 4, 8), -1.0)
    image[0, 0, :, :2] = 0.5
    image[0, 0, 0, 4] = 1.0
    garment, edge, background = regions_of(image, 2)[0].T
    assert garment.tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    assert edge.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert background.tolist() == [0, 1, 0, 1, 0, 1, 1, 1]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A small DiT of the packaged data's shape whose routers say no to everything."""
    from dydit_cli.artifacts import save_model, write_manifest
    from dydit_cli.families.registry import family_named

    config = {
        "sample_size": 32,
        "patch_size": 8,
        "in_channels": 1,
        "hidden_size": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_classes": 10,
        "num_groups": 4,
    }
    model = family_named("dit").build(config)
    with torch.no_grad():
        for block in model.dynamic_blocks:
            for router in (block.head_router, block.channel_router):
                for parameter in router.parameters():
                    parameter.zero_()
            for parameter in block.token_router.parameters():
                parameter.zero_()
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(model, folder)
    write_manifest(folder, stage="finetune", settings={"seed": 3}, results={"target_ratio": 0.5, "steps": 9})
    return folder


def test_a_model_whose_routers_say_no(trained: Path) -> None:
    found = decisions_of(trained, "fashion-mnist-subset", images=4, levels=3)
    assert found.name.endswith("λ 0.5, seed 3")
    assert list(found.noise) == sorted(found.noise, reverse=True)
    # Logits of 0 are not above 0: all is off but what is always on.
    assert np.allclose(found.heads, 1 / 2)
    assert np.allclose(found.groups, 1 / 4)
    assert np.allclose(found.tokens, 0)
    assert found.narrowest.all()
    facts = facts_of(found)
    assert facts.skipped == 1
    assert facts.always_skipped == (0, 1)
    # N = 16 tokens, C = 16, 4C hidden channels: attention 4NC² + 2N²C, of which one head of two; an MLP 8NC², of which one group of four.
    attention, mlp = 4 * 16 * 16**2 + 2 * 16**2 * 16, 8 * 16 * 16**2
    assert np.allclose(found.width, (attention / 2 + mlp / 4) / (attention + mlp))
    assert np.allclose(found.macs, attention / 2 / (attention + mlp))
    assert found.region_sizes.sum() == pytest.approx(1)


def test_the_script_writes_page_and_pictures(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "docs"
    assert main([str(trained), "--out", str(out), "--images", "4", "--levels", "6"]) == 0
    text = (out / "learned.md").read_text(encoding="utf-8")
    for name in ("learned_width", "learned_blocks", "learned_regions", "learned_tokens_dit"):
        assert f"images/{name}.png" in text
        assert 2_000 < (out / "images" / f"{name}.png").stat().st_size < 150_000
    assert str(tmp_path) not in text


def test_the_cells_of_the_protocol_are_found_in_their_order(tmp_path: Path) -> None:
    def cell(name: str, family: str, ratio: float, seed: int, **changes: Any) -> Path:
        folder = tmp_path / "cells" / name
        folder.mkdir(parents=True)
        content = {"name": name, "family": family, "arm": "dynamic", "lambda": ratio, "seed": seed}
        (folder / "cell.json").write_text(json.dumps(content | {"variant": "", "group": "core"} | changes))
        return folder / "trained"

    with pytest.raises(SystemExit, match="no dynamic cell"):
        models_of(tmp_path)
    third, second = cell("c", "sit", 0.5, 0), cell("b", "dit", 0.3, 0)
    first, later = cell("z", "dit", 0.5, 0), cell("a", "dit", 0.5, 1)
    cell("d", "dit", 0.5, 100, group="choice")
    cell("e", "dit", 0.5, 0, variant="fp32", group="extended")
    cell("f", "dit", 0.5, 0, arm="static-control")
    assert models_of(tmp_path) == [first, later, second, third]
    cell("again", "sit", 0.5, 0)
    with pytest.raises(SystemExit, match="more than once"):
        models_of(tmp_path)
