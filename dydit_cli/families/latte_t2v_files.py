"""Files of the text-to-video Latte: diffusers' folders, and the original LatteT2V with the same names.

A diffusers folder's ``config.json`` says everything. The original `.pt` says nothing beside its tensors, and these tell neither
heads nor resolution nor length: both follow the width of the one published model (16 heads, 512 pixels, 16 frames) unless tables of
positions were saved along.

Source: Vchitect/Latte, models/latte_t2v.py, and diffusers' `LatteTransformer3DModel`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dydit_cli.checkpoints.layout import Rearranged, Rows
from dydit_cli.checkpoints.lazy import lazily
from dydit_cli.errors import DyditError
from dydit_cli.families.family import Hints, Source
from dydit_cli.families.original_dit import heads_of

BLOCK_KEY = re.compile(r"(temporal_transformer_blocks|transformer_blocks)\.(\d+)\.")
TEMPLATE_KEYS = (
    "pos_embed.proj.weight",
    "transformer_blocks.0.attn2.to_k.weight",
    "temporal_transformer_blocks.0.attn1.to_q.weight",
    "adaln_single.linear.weight",
    "caption_projection.linear_1.weight",
    "proj_out.weight",
)

# How many axes the tensors have whose shapes tell the geometry.
AXES = {"pos_embed.proj.weight": 4, "caption_projection.linear_1.weight": 2, "proj_out.weight": 2}

# Tables that older classes kept in their files. They are functions of the geometry, or are not used at inference.
PLACES, FRAMES, NO_CAPTION = "pos_embed.pos_embed", "temp_pos_embed", "caption_projection.y_embedding"

PUBLISHED_SIZE, PUBLISHED_FRAMES, PUBLISHED_EPS = 64, 16, 1e-6
"""Of Latte-1: 512 pixels under an autoencoder of factor 8."""

# What the class can be configured to and this model is not.
FIXED = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
}


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of a text-to-video Latte; temporal blocks and a prompt's projection tell it from others."""
    return all(key in tensors for key in TEMPLATE_KEYS)


def read(tensors: Mapping[str, Tensor], hints: Hints) -> Source:
    """Take the configuration from the folder's ``config.json`` and the tensors, and leave out tables of positions.

    Raises:
        DyditError: If they contradict each other, blocks are missing, or the configuration is of another kind of block.
    """
    # An artifact of ours is never read here, and another class's configuration says nothing.
    config = hints.config if str(hints.config.get("_class_name", "")).startswith("Latte") else {}
    _check_kind(config)
    dropped = (PLACES, FRAMES, NO_CAPTION)
    kept = {key: (Rows(key),) for key in tensors if key not in dropped}
    return Source(_geometry(tensors, config, hints), Rearranged(tensors, kept), dynamic=False)


def write(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys are diffusers' already; routers and orders stand beside them under our names."""
    return dict(state)


def _check_kind(config: Mapping[str, Any]) -> None:
    for name, expected in FIXED.items():
        if config.get(name, expected) != expected:
            raise DyditError(
                f"The checkpoint's config.json sets {name} to {config[name]!r}.",
                why=f"The blocks of the published text-to-video Latte have {expected!r}, and dydit knows no others.",
                fix="Bring a Latte of the published form.",
            )


def _geometry(tensors: Mapping[str, Tensor], config: Mapping[str, Any], hints: Hints) -> dict[str, Any]:
    specs = lazily(tensors).specs
    for key, axes in AXES.items():
        if len(specs[key].shape) != axes or 0 in specs[key].shape:
            raise DyditError(
                f"The tensor '{key}' of the checkpoint is of shape {specs[key].shape}.",
                why=f"The geometry of the model is read from its {axes} axes, none of which may be empty.",
                fix="Save the state dict of the whole model again.",
            )
    hidden, in_channels, patch, _ = specs["pos_embed.proj.weight"].shape
    heads = int(hints.num_heads or config.get("num_attention_heads") or heads_of(hidden, hints))
    if hidden % heads:
        raise DyditError(
            f"{heads} attention heads do not divide the {hidden} channels of the checkpoint.",
            why="Every head is equally wide.",
            fix="Pass --num-heads N with a divisor, or bring the config.json that belongs to the weights.",
        )
    places = math.isqrt(specs[PLACES].shape[-2]) * patch if PLACES in specs else PUBLISHED_SIZE
    frames = specs[FRAMES].shape[-2] if FRAMES in specs else PUBLISHED_FRAMES
    return {
        "num_attention_heads": heads,
        "attention_head_dim": hidden // heads,
        "in_channels": in_channels,
        "out_channels": specs["proj_out.weight"].shape[0] // patch**2,
        "num_layers": _depth(tensors),
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in specs,
        "sample_size": int(config.get("sample_size", places)),
        "patch_size": patch,
        "norm_eps": float(config.get("norm_eps", PUBLISHED_EPS)),
        "caption_channels": specs["caption_projection.linear_1.weight"].shape[1],
        "video_length": int(config.get("video_length", frames)),
        "num_groups": hints.num_groups,
        "always_on": True,
    }


def _depth(tensors: Mapping[str, Tensor]) -> int:
    """Blocks of each kind."""
    found: dict[str, set[int]] = {}
    for key in tensors:
        match = BLOCK_KEY.match(key)
        if match:
            found.setdefault(match[1], set()).add(int(match[2]))
    spatial, temporal = found["transformer_blocks"], found["temporal_transformer_blocks"]
    if spatial == temporal == set(range(len(spatial))):
        return len(spatial)
    raise DyditError(
        f"The checkpoint holds {len(spatial)} spatial and {len(temporal)} temporal blocks, the last of which are numbers "
        f"{max(spatial)} and {max(temporal)}.",
        why="Blocks of both kinds take turns and are numbered from 0 without gaps, so that some are missing.",
        fix="Save the state dict of the whole model again.",
    )
