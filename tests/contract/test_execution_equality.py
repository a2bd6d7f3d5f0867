"""Dense and compact execution are two computations of one thing; they must agree."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from dydit_cli.dynamic.gates import Gating, ImposedGating, ThresholdGating
from dydit_cli.dynamic.routing import Routing
from dydit_cli.execution import CompactExecutor, DenseExecutor
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.family import Family
from tests.tiny import (
    ALL,
    each_family,
    predict,
    random_routing,
    relative_difference,
    tiny_inputs,
    tiny_model,
    uniform_routing,
)

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
PRECISIONS = pytest.mark.parametrize("dtype", list(TOLERANCES))
BATCH = 4

# (heads, groups, tokens) that are on, the tokens of 16 or more.
CORNERS = {
    "complete": (ALL, ALL, ALL),
    "no tokens": (ALL, ALL, 0),
    "one token": (ALL, ALL, 1),
    "one head": (1, ALL, ALL),
    "no head": (0, ALL, ALL),
    "one group": (ALL, 1, ALL),
    "no group": (ALL, 0, ALL),
    "one head and one group": (1, 1, ALL),
    "no head and no group": (0, 0, ALL),
    "nothing": (0, 0, 0),
    "prefixes": (3, 4, 7),
}

SHAPES = {
    "usual": {},
    "no always-on unit": {"always_on": False},
    "fewer groups than heads": {"num_groups": 4},
    "more groups than heads": {"num_groups": 24},
    "one head": {"num_attention_heads": 1, "num_groups": 6},
    "one group": {"num_groups": 1},
    "narrow MLP": {"mlp_hidden_size": 36},
    "no learned sigma": {"learn_sigma": False},
    "ordered width": {"width": "ordered"},
    "patches of one": {"patch_size": 1, "sample_size": 4},
}


def both(
    model: DynamicTransformer, gating: Gating, batch: int = BATCH, *, compact: CompactExecutor | None = None
) -> tuple[Tensor, Tensor, Routing, Routing]:
    arguments = tiny_inputs(model, batch)
    with torch.no_grad():
        dense, first = model.denoise(*arguments, executor=DenseExecutor(), gating=gating)
        sliced, second = model.denoise(*arguments, executor=compact or CompactExecutor(), gating=gating)
    return dense, sliced, first, second


@each_family
@PRECISIONS
@pytest.mark.parametrize("corner", list(CORNERS))
def test_corners(family: Family, dtype: torch.dtype, corner: str) -> None:
    model = tiny_model(family).to(dtype)
    heads, groups, tokens = CORNERS[corner]
    routing = uniform_routing(model.geometry, BATCH, heads=heads, groups=groups, tokens=tokens)
    dense, compact, _, record = both(model, ImposedGating(routing))
    assert relative_difference(compact, dense) < TOLERANCES[dtype]
    assert torch.equal(record.heads, routing.heads)
    assert torch.equal(record.groups, routing.groups)
    assert torch.equal(record.tokens, routing.tokens)


@each_family
@PRECISIONS
@pytest.mark.parametrize("seed", range(4))
def test_random_masks_of_each_sample(family: Family, dtype: torch.dtype, seed: int) -> None:
    model = tiny_model(family, seed=seed).to(dtype)
    routing = random_routing(model.geometry, BATCH, seed, keep=(0.2, 0.5, 0.5, 0.8)[seed])
    dense, compact, _, _ = both(model, ImposedGating(routing))
    assert relative_difference(compact, dense) < TOLERANCES[dtype]


@each_family
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_random_masks_of_unusual_shapes(family: Family, shape: str) -> None:
    model = tiny_model(family, **SHAPES[shape])
    for shared in (False, True):
        dense, compact, _, _ = both(
            model, ImposedGating(random_routing(model.geometry, BATCH, shared=shared))
        )
        assert relative_difference(compact, dense) < 1e-5


@each_family
def test_samples_that_share_a_width_in_part(family: Family) -> None:
    """Samples 0 and 2 have one width, 1 and 3 others; one sample keeps no token, one all."""
    model = tiny_model(family)
    drawn = random_routing(model.geometry, BATCH)

    def rearranged(mask: Tensor) -> Tensor:
        return mask[[0, 1, 0, 3]]

    def tokens(mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask[0], mask[2] = 0, 1
        return mask

    routing = Routing(
        tuple(replace(block.map(rearranged), tokens=tokens(block.tokens)) for block in drawn.blocks)
    )
    dense, compact, _, _ = both(model, ImposedGating(routing))
    assert relative_difference(compact, dense) < 1e-5


@each_family
def test_a_sample_does_not_see_its_batch(family: Family) -> None:
    """A batch of mixed timesteps gives what each sample gives alone, in compact execution too."""
    model = tiny_model(family).set_execution("compact")
    images, times, labels = tiny_inputs(model, BATCH)
    with torch.no_grad():
        together = predict(model, images, times, labels)
        alone = torch.cat(
            [predict(model, images[i : i + 1], times[i], labels[i : i + 1]) for i in range(BATCH)]
        )
    assert relative_difference(alone, together) < 1e-5


@each_family
def test_one_executor_serves_changing_masks(family: Family) -> None:
    """Slices of earlier masks are kept; a later mask must not be given another's."""
    model, executor = tiny_model(family), CompactExecutor()
    for seed in (*range(6), 0, 3):
        dense, compact, _, _ = both(
            model, ImposedGating(random_routing(model.geometry, BATCH, seed)), compact=executor
        )
        assert relative_difference(compact, dense) < 1e-5


@dataclass
class Recording:
    """A gating that remembers its logits."""

    live: ThresholdGating
    logits: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def heads(self, block: int, logits: Tensor) -> Tensor:
        self.logits["heads", block] = logits
        return self.live.heads(block, logits)

    def groups(self, block: int, logits: Tensor) -> Tensor:
        self.logits["groups", block] = logits
        return self.live.groups(block, logits)

    def context_groups(self, block: int, logits: Tensor) -> Tensor:
        self.logits["context_groups", block] = logits
        return self.live.context_groups(block, logits)

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        self.logits["tokens", block] = logits
        return self.live.tokens(block, logits)


@each_family
@pytest.mark.parametrize(("dtype", "margin"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("seed", range(3))
def test_live_decisions_differ_only_on_the_fence(
    family: Family, dtype: torch.dtype, margin: float, seed: int
) -> None:
    model = tiny_model(family, seed=seed).to(dtype)
    recording = Recording(ThresholdGating())
    dense, compact, first, second = both(model, recording)
    assert 0.1 < float(first.tokens.mean()) < 0.9
    assert 0.1 < float(first.heads.mean()) < 0.95
    differing = 0
    for (kind, block), logits in recording.logits.items():
        assert logits.dtype == torch.float32
        one, other = getattr(first.blocks[block], kind), getattr(second.blocks[block], kind)
        changed = (one != other)[:, -logits.shape[1] :]
        differing += int(changed.sum())
        assert (logits[changed].abs() < margin * logits.abs().max()).all()
    if not differing:
        assert relative_difference(compact, dense) < TOLERANCES[dtype]
    assert differing < 10


@each_family
@pytest.mark.parametrize("dial", [float("-inf"), -1.0, 0.0, 1.0, float("inf")])
def test_the_dial(family: Family, dial: float) -> None:
    """-inf leaves the always-on units alone, +inf is the complete model; a larger dial never keeps fewer heads."""
    model = tiny_model(family).set_keep_bias(dial)
    dense, compact, routing, live = both(model, ThresholdGating(dial))
    assert relative_difference(compact, dense) < 1e-5
    assert torch.equal(routing.tokens, live.tokens)
    arguments = tiny_inputs(model, BATCH)
    with torch.no_grad():
        assert torch.equal(predict(model.set_execution("dense"), *arguments), dense)
        assert torch.equal(predict(model.set_execution("compact"), *arguments), compact)
    undialled = model.set_execution("dense").set_keep_bias(0.0).routing(arguments[1])
    if dial == float("-inf"):
        assert torch.equal(routing.heads.sum(-1), torch.ones(BATCH, model.geometry.depth))
        assert torch.equal(routing.groups.sum(-1), torch.ones(BATCH, model.geometry.depth))
        assert not routing.tokens.any()
    elif dial == float("inf"):
        assert routing.heads.all()
        assert routing.groups.all()
        assert routing.tokens.all()
    else:
        assert ((routing.heads - undialled.heads) * (1 if dial >= 0 else -1) >= 0).all()


@each_family
def test_the_dial_at_minus_infinity_without_always_on_units(family: Family) -> None:
    model = tiny_model(family, always_on=False)
    dense, compact, routing, _ = both(model, ThresholdGating(float("-inf")))
    assert not routing.heads.any()
    assert not routing.groups.any()
    assert relative_difference(compact, dense) < 1e-5
