"""Tiny models shared by the tests: every weight non-zero, orders shuffled, routers that keep about half of the units.

A model in which something is zero or in its natural order hides mistakes: a skipped branch adds nothing, a wrong order is right.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routers import OrderedWidthRouter, WidthRouter
from dydit_cli.dynamic.routing import BlockRouting, Routing
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.dynamic_model import DynamicModel
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
CONFIGS["latte"] = CONFIGS["dit"] | {"num_frames": 2}
CONFIGS["latte-t2v"] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "num_attention_heads": 6,
    "attention_head_dim": 8,
    "caption_channels": 20,
    "video_length": 2,
    "text_tokens": 5,
}
CONFIGS["flux"] = {
    "sample_size": 8,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 1,
    "num_attention_heads": 6,
    "attention_head_dim": 8,
    "axes_dims_rope": (2, 2, 4),
    "joint_attention_dim": 20,
    "pooled_projection_dim": 12,
    "guidance_embeds": True,
    "text_tokens": 5,
}

TINY = [family for family in FAMILIES if family.name in CONFIGS]
LABELLED = [family for family in TINY if "num_classes" in CONFIGS[family.name]]

each_family = pytest.mark.parametrize("family", TINY, ids=[family.name for family in TINY])
each_labelled_family = pytest.mark.parametrize("family", LABELLED, ids=[family.name for family in LABELLED])
"""Those that are conditioned on class labels, on blocks of DiT's form and keys."""

TRAINED = [family for family in TINY if "dydit finetune" not in family.missing]

each_trained_family = pytest.mark.parametrize("family", TRAINED, ids=[family.name for family in TRAINED])
"""Those that dydit trains itself."""


def tiny_config(family: Family, **changes: Any) -> dict[str, Any]:
    """A family's tiny configuration with ``changes``, of the same width whatever the number of heads.

    A test that changes what a family does not have is skipped for it.
    """
    foreign = set(changes) - set(signature(family.model_class.__init__).parameters)
    if foreign:
        pytest.skip(f"{family.title} has no {', '.join(sorted(foreign))}")
    config = CONFIGS[family.name] | changes
    if "attention_head_dim" in CONFIGS[family.name] and "attention_head_dim" not in changes:
        base = CONFIGS[family.name]
        width = base["num_attention_heads"] * base["attention_head_dim"]
        config["attention_head_dim"] = width // config["num_attention_heads"]
    if "axes_dims_rope" in config:
        config["axes_dims_rope"] = (2, 2, config["attention_head_dim"] - 4)
    return config


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
    model = family.build(tiny_config(family, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
            if "_router." in name:
                parameter.mul_(5)
        if shuffled:
            for order in orders(model).values():
                order.copy_(torch.randperm(len(order), generator=generator))
        model.denoise(*tiny_inputs(model, 8), gating=Balancing(model, generator))
    return model.eval()


def orders(model: DynamicModel) -> dict[str, Tensor]:
    """The orders of importance of a model, by name."""
    return {name: order for name, order in model.named_buffers() if name.endswith("_order")}


class Balancing:
    """A gating that keeps everything and moves the routers' biases to where about half would be kept.

    Width logits depend on t alone; each unit's are centred over t, so that most units change over a schedule.
    """

    def __init__(self, model: DynamicTransformer, generator: torch.Generator) -> None:
        self._blocks = model.dynamic_blocks
        self._generator = generator

    def _centre(self, router: WidthRouter, logits: Tensor) -> Tensor:
        if isinstance(router, OrderedWidthRouter):
            # Its rows are steps between units, so that only all of them move.
            router.shift(-float(logits.median()))
            return torch.ones_like(logits)
        bias = router.linear.bias
        spread = (logits - logits.mean(dim=0)).square().mean(dim=0).sqrt().clamp(min=1e-3)
        bias += spread * torch.randn(len(bias), generator=self._generator) - logits.mean(dim=0)
        return torch.ones_like(logits)

    def heads(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self._centre(self._blocks[block].head_router, logits)

    def groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self._centre(self._blocks[block].channel_router, logits)

    def context_groups(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        return self._centre(self._blocks[block].context_channel_router, logits)

    def tokens(self, block: int, logits: Tensor) -> Tensor:
        """See `Gating`."""
        self._blocks[block].token_router.shift(-float(logits.median()))
        return torch.ones_like(logits)


def tiny_inputs(model: DynamicTransformer, batch: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Any]:
    """(B, *sample_shape) noise, (B,) distinct timesteps in the family's own convention, (B,) labels, the null class among them.

    Of a family without labels, other conditions take their place.
    """
    geometry, generator = model.geometry, torch.Generator().manual_seed(seed)
    shape = (batch, *geometry.sample_shape)
    fractions = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    times = (fractions * 1000).floor() if family_named(model.family).objective == "diffusion" else fractions
    if not geometry.num_classes:
        _, condition = model.example_inputs(batch, seed)
        return torch.randn(shape, generator=generator), times, condition
    labels = torch.randint(geometry.num_classes, (batch,), generator=generator)
    labels[-1] = geometry.num_classes
    return torch.randn(shape, generator=generator), times, labels


def predict(model: DynamicModel, sample: Tensor, timestep: Tensor | float, condition: Any) -> Tensor:
    """What a model predicts as it is set: by `forward` where the condition is labels, else by `denoise`, which runs the same."""
    if isinstance(condition, Tensor):
        return model(sample, timestep, condition).sample
    return model.denoise(sample, timestep, condition)[0]


def first_weight(block: nn.Module) -> Tensor:
    """Of a block, the weight of queries, keys and values, or of queries alone."""
    return next(
        value for name, value in block.named_parameters() if name.startswith("attn") and value.ndim == 2
    )


def flipped(condition: Any) -> Any:
    """Conditions in the opposite order."""
    return condition[torch.arange(len(condition)).flip(0)]


def routing_of(geometry: Geometry, heads: Tensor, groups: Tensor, tokens: Tensor) -> Routing:
    """Masks (B, L, H), (B, L, G), (B, L, N) as a `Routing`; blocks with an MLP for text give it the groups of the block before."""
    masks = zip(heads.unbind(1), groups.unbind(1), tokens.unbind(1), strict=True)
    blocks = [BlockRouting(*(part.float() for part in block)) for block in masks]
    for index in range(getattr(geometry, "num_double", 0)):
        blocks[index] = replace(blocks[index], context_groups=groups[:, index - 1].float())
    return Routing(tuple(blocks))


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


ALL = sys.maxsize
"""More than any model has of anything."""


def uniform_routing(
    geometry: Geometry, batch: int, *, heads: int = ALL, groups: int = ALL, tokens: int = ALL
) -> Routing:
    """The first ``heads``, ``groups`` and ``tokens`` of every block are on, all of them by default."""
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
