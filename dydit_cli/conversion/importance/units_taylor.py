"""Taylor scores of FLUX's units: how much the loss would change, to first order, if a unit were switched off.

Each unit gets a gate m = 1 where its output enters the residual stream; its score is the mean over samples of |dL/dm|, the gradient
summed over the tokens of a sample first. A head that serves image and text has a gate in each stream, and the sum of both scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dydit_cli.conversion.importance.units import UnitScores
from dydit_cli.data.conditions import conditions_of
from dydit_cli.data.source import Source
from dydit_cli.dynamic.gates import CompleteGating
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import require
from dydit_cli.families.flux import DyFluxTransformer2DModel
from dydit_cli.families.registry import family_of
from dydit_cli.objectives import Objective
from dydit_cli.randomness import generator, normal, uniform


@dataclass
class _Gates:
    """Gates of one, made when a layer is met, by (key of the units' order, part of the tokens)."""

    values: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def of(self, order: str, part: str, units: int, like: Tensor) -> Tensor:
        """(B, 1, channels) gates of ``units`` units over the last dimension of ``like``."""
        gate = torch.ones(len(like), units, device=like.device, requires_grad=True)
        self.values[order, part] = gate
        return gate.repeat_interleave(like.shape[-1] // units, dim=1)[:, None]


def taylor_units(
    model: DynamicModel,
    source: Source,
    objective: Objective,
    *,
    samples: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> UnitScores:
    """Score all heads and channels on ``samples`` training samples at stratified timesteps.

    Args:
        model: A FLUX, frozen; its parameters get no gradient.
        source: Samples to score on, of one resolution.
        objective: The family's.
        samples: How many; at least 256 are sensible.
        batch_size: Samples a pass.
        seed: Of samples, timesteps and noise.
        on_progress: Called with (done, all) samples.

    Raises:
        DyditError: If the family has no such ranking.
    """
    if not isinstance(model, DyFluxTransformer2DModel):
        require(family_of(model), "--importance taylor")
        raise TypeError(f"{type(model).__name__} has blocks of another form")
    chosen = torch.randperm(len(source), generator=generator(seed, "taylor-order"))[:samples].tolist()
    totals: dict[str, Tensor] = {}
    executor = model.make_executor("static")
    for start in range(0, len(chosen), batch_size):
        indices = list(range(start, min(start + batch_size, len(chosen))))
        picks = [chosen[index] for index in indices]
        clean = source.batch(picks).to(model.device)
        noise = torch.stack(
            [normal(seed, tuple(clean.shape[1:]), "taylor-noise", index) for index in indices]
        )
        noise = noise.to(model.device)
        uniforms = torch.stack([uniform(seed, (), "taylor-t", index) for index in indices])
        times = objective.draw_timesteps(uniforms, indices).to(model.device)
        condition = conditions_of(source, picks).to(model.device)
        gates = _Gates()
        with _gated(model, gates):
            prediction, _ = model.denoise(
                objective.noised(clean, noise, times),
                times,
                condition,
                executor=executor,
                gating=CompleteGating(),
            )
        loss = objective.losses(prediction, clean, noise, times)["loss"].sum()
        # The text stream of the last double block before the end may not reach the prediction.
        gradients = torch.autograd.grad(loss, list(gates.values.values()), allow_unused=True)
        for (order, _), gradient in zip(gates.values, gradients, strict=True):
            if gradient is not None:
                totals[order] = totals.get(order, 0) + gradient.abs().sum(dim=0).cpu()
        if on_progress is not None:
            on_progress(indices[-1] + 1, len(chosen))
    details = {"samples": len(chosen), "seed": seed, "data": source.describe()}
    return UnitScores({key: total / len(chosen) for key, total in totals.items()}, "taylor", details)


@contextmanager
def _gated(model: DyFluxTransformer2DModel, gates: _Gates) -> Iterator[None]:
    """Multiply what enters the layers that write into the residual stream."""
    heads, channels = model.geometry.num_heads, model.geometry.mlp_hidden
    hidden = model.geometry.hidden_size

    def whole(
        order: str, part: str, units: int, layer: nn.Module, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        return (inputs[0] * gates.of(order, part, units, inputs[0]), *inputs[1:])

    def joint(block: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Of a single block: text tokens, then image tokens; of each, attention's channels, then the MLP's.
        attended, active = inputs[0][..., :hidden], inputs[0][..., hidden:]
        text = inputs[0].shape[1] - image_tokens
        order = f"{block}.attn.head_order"
        parts = [
            attended[:, :text] * gates.of(order, "text", heads, attended),
            attended[:, text:] * gates.of(order, "image", heads, attended),
        ]
        active = active * gates.of(f"{block}.channel_order", "all", channels, active)
        return (torch.cat([torch.cat(parts, dim=1), active], dim=2), *inputs[1:])

    image_tokens = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal image_tokens
        image_tokens = inputs[0].shape[1]

    hooks = [model.x_embedder.register_forward_pre_hook(count)]
    doubles: Iterable[Any] = model.transformer_blocks
    singles: Iterable[Any] = model.single_transformer_blocks
    for index, block in enumerate(doubles):
        name = f"transformer_blocks.{index}"
        for layer, order, part, units in (
            (block.attn.to_out[0], f"{name}.attn.head_order", "image", heads),
            (block.attn.to_add_out, f"{name}.attn.head_order", "text", heads),
            (block.ff.net[2], f"{name}.ff.channel_order", "image", channels),
            (block.ff_context.net[2], f"{name}.ff_context.channel_order", "text", channels),
        ):
            hooks.append(layer.register_forward_pre_hook(partial(whole, order, part, units)))
    for index, block in enumerate(singles):
        hooks.append(
            block.proj_out.register_forward_pre_hook(partial(joint, f"single_transformer_blocks.{index}"))
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
