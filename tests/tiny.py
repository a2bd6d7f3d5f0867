"""Tiny models shared by the tests: every weight non-zero, orders shuffled, routers that keep about half of the units.

A model in which something is zero or in its natural order hides mistakes: a skipped branch adds nothing, a wrong order is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import BlockRouting, Routing
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.family import Family
from dydit_cli.families.registry import FAMILIES, family_named

# A new family adds its smallest configuration here and inherits every test of tests/contract.
CONFIGS: dict[str, dict[str, Any]] = {
    name: {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 48,
        "num_layers": 3,
        "num_attention_heads": 6,
        "num_classes": 10,
    }
    for name in ("dit", "sit")
}

each_family = pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])


def tiny_model(
    family: Family | str = "dit", *, seed: int = 0, shuffled: bool = True, **changes: Any
) -> DynamicTransformer:
    """A model in eval mode of a family's tiny configuration with ``changes``, random throughout.

    Args:
        family: A family or its name.
        seed: Of all weights and orders.
        shuffled: Whether heads and channels have a random order of importance.
        changes: Of the configuration.
    """
    family = family_named(family) if isinstance(family, str) else family
    model = family.build(CONFIGS[family.name] | changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
            if "_router." in name:
                parameter.mul_(5)
        if shuffled:
            for block in model.blocks:
                for order in (block.attn.head_order, block.mlp.channel_order):
                    order.copy_(torch.randperm(len(order), generator=generator))
        model.denoise(*tiny_inputs(model, 8), gating=Balancing(model, generator))
    return model.eval()


class Balancing:
    """A gating that keeps everything and moves the routers' biases to where about half would be kept.

    Width logits depend on t alone; each unit's are centred over t, so that most units change over a schedule.
    """

    def __init__(self, model: DynamicTransformer, generator: torch.Generator) -> None:
        self._blocks = model.blocks
        self._generator = generator

    def _centre(self, bias: Tensor, logits: Tensor) -> Tensor:
        spread = (logits - logits.mean(dim=0)).square().mean(dim=0).sqrt().clamp(min=1e-3)
        bias += spread * torch.randn(len(bias), generator=self._generator) - logits.mean(dim=0)
        return torch.ones_like(logits)

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self._centre(self._blocks[block].head_router.linear.bias, logits)

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self._centre(self._blocks[block].channel_router.linear.bias, logits)

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        self._blocks[block].token_router.score.bias -= logits.median()
        return torch.ones_like(logits)


def tiny_inputs(model: DynamicTransformer, batch: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(B, C, h, w) noise, (B,) distinct timesteps in the family's own convention, (B,) labels, the null class among them."""
    geometry, generator = model.geometry, torch.Generator().manual_seed(seed)
    shape = (batch, geometry.in_channels, geometry.sample_size, geometry.sample_size)
    fractions = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    times = (fractions * 1000).floor() if family_named(model.family).objective == "diffusion" else fractions
    labels = torch.randint(geometry.num_classes, (batch,), generator=generator)
    labels[-1] = geometry.num_classes
    return torch.randn(shape, generator=generator), times, labels


def routing_of(geometry: Geometry, heads: Tensor, groups: Tensor, tokens: Tensor) -> Routing:
    """Masks (B, L, H), (B, L, G), (B, L, N) as a `Routing`."""
    masks = zip(heads.unbind(1), groups.unbind(1), tokens.unbind(1), strict=True)
    return Routing(tuple(BlockRouting(*(part.float() for part in block)) for block in masks))


def random_routing(
    geometry: Geometry, batch: int, seed: int = 2, keep: float = 0.5, shared: bool = False
) -> Routing:
    """Masks at random, unit 0 among them, so that no head at all may be on; ``shared`` gives every sample the same."""
    generator, depth = torch.Generator().manual_seed(seed), geometry.depth
    sizes = (geometry.num_heads, geometry.num_groups, geometry.num_tokens)
    rows = 1 if shared else batch
    masks = [
        (torch.rand(rows, depth, size, generator=generator) < keep).expand(batch, -1, -1) for size in sizes
    ]
    return routing_of(geometry, *masks)


def uniform_routing(geometry: Geometry, batch: int, *, heads: int, groups: int, tokens: int) -> Routing:
    """The first ``heads``, ``groups`` and ``tokens`` of every block are on."""
    counts = ((geometry.num_heads, heads), (geometry.num_groups, groups), (geometry.num_tokens, tokens))
    masks = [(torch.arange(size) < count).expand(batch, geometry.depth, -1) for size, count in counts]
    return routing_of(geometry, *masks)


def bits(tensor: Tensor) -> Tensor:
    """A tensor as raw bytes, so that equality means equality of every bit, signs of zero and NaN included."""
    return tensor.detach().contiguous().view(torch.uint8)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the largest expected value."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def router_names(model: DynamicTransformer) -> Iterator[str]:
    """Names of the routers' parameters."""
    return (name for name, _ in model.named_parameters() if "_router." in name)
