"""DiT's two file layouts: the original repository's, and diffusers' `DiTTransformer2DModel`.

The model keeps the original's keys. diffusers' layout splits queries, keys and values, repeats the embedders of timestep and class
in every block, and has no table of positions, which follows from the resolution. It is also another function of the same numbers:
its timestep frequencies divide by one less than their number, and its LayerNorm before the MLP has an epsilon of its own. Both are
kept in the model's configuration, so that what is computed is what diffusers computes.

Sources: facebookresearch/DiT, models.py; diffusers, models/transformers/dit_transformer_2d.py and models/embeddings.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

from dydit_cli.checkpoints.layout import Layout, Rearranged, Rows
from dydit_cli.checkpoints.lazy import LazyTensors, TensorSpec, lazily
from dydit_cli.errors import DyditError
from dydit_cli.families import original_dit
from dydit_cli.families.family import Hints, Source
from dydit_cli.families.original_dit import check_axes, depth_of, heads_of

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
DIFFUSERS_KEYS = (
    "pos_embed.proj.weight",
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
    "transformer_blocks.0.attn1.to_q.weight",
    "proj_out_1.weight",
    "proj_out_2.weight",
)
BLOCK_KEY = re.compile(r"transformer_blocks\.(\d+)\.(.+)$")
EMBEDDER = ".norm1.emb."
PLACES = "pos_embed"
OLD_TABLE = "pos_embed.pos_embed"
"""Some older files hold the table of positions, which follows from the resolution."""

# The embedders, which every block repeats: ours -> theirs, inside a block's `norm1.emb`.
EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
# Outside blocks, and inside: ours -> theirs, each with a weight and a bias.
OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
INNER = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
FUSED = ("attn1.to_q", "attn1.to_k", "attn1.to_v")

FREQUENCY_SHIFT = 1.0
"""diffusers' DiT has it in its code and not in its configuration."""
DEFAULT_EPS = 1e-5
"""Of diffusers' class, where the configuration does not say it."""
AXES = {
    "pos_embed.proj.weight": 4,
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight": 2,
    "transformer_blocks.0.ff.net.0.proj.weight": 2,
    "proj_out_2.weight": 2,
}
# What the class can be configured to and this model is not.
FIXED = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "attention_bias": True,
}


def recognises_diffusers(keys: Iterable[str]) -> bool:
    """Whether the keys are those of diffusers' DiT."""
    held = set(keys)
    return all(key in held for key in DIFFUSERS_KEYS)


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of a DiT in either layout."""
    return original_dit.recognises(tensors) or recognises_diffusers(tensors)


def layout_of(keys: Iterable[str]) -> str:
    """``original`` or ``diffusers``."""
    return "diffusers" if recognises_diffusers(keys) else "original"


def read(tensors: Mapping[str, Tensor], hints: Hints) -> Source:
    """Infer the configuration and give the tensors the original's keys.

    Raises:
        DyditError: As `original_dit.read`; of diffusers' layout, if there is no ``config.json``, or it is of another kind of block.
    """
    if not recognises_diffusers(tensors):
        return original_dit.read(tensors, hints)
    _check_kind(hints.config)
    config = _geometry(tensors, hints)
    table = places_table(config["hidden_size"], config["sample_size"] // config["patch_size"])
    return Source(config, _Original(tensors, config["num_layers"], table), dynamic=False)


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of diffusers' class, from a static state dict under the original's keys; the way back of `read`."""
    state = lazily(state)
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    layout: dict[str, tuple[Rows, ...]] = {}
    for ours, theirs in OUTER.items():
        layout |= {f"{theirs}.{kind}": (Rows(f"{ours}.{kind}"),) for kind in ("weight", "bias")}
    hidden = state.spec("x_embedder.proj.weight").shape[0]
    for number in range(depth):
        block = f"transformer_blocks.{number}."
        layout |= {f"{block}norm1.emb.{theirs}": (Rows(ours),) for ours, theirs in EMBEDDERS.items()}
        for kind in ("weight", "bias"):
            mine = f"blocks.{number}."
            layout |= {
                f"{block}{theirs}.{kind}": (Rows(f"{mine}{ours}.{kind}"),) for ours, theirs in INNER.items()
            }
            fused = f"{mine}attn.qkv.{kind}"
            layout |= {
                f"{block}{part}.{kind}": (Rows(fused, place * hidden, (place + 1) * hidden),)
                for place, part in enumerate(FUSED)
            }
    # Copies: views of one tensor, and tensors that every block shares, cannot be saved as safetensors.
    return {key: tensor.clone().contiguous() for key, tensor in Rearranged(state, layout).items()}


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What diffusers' class is configured with, from the configuration of ours."""
    heads = int(config["num_attention_heads"])
    return {
        "num_attention_heads": heads,
        "attention_head_dim": int(config["hidden_size"]) // heads,
        "in_channels": int(config["in_channels"]),
        "out_channels": int(config["out_channels"]),
        "num_layers": int(config["num_layers"]),
        "sample_size": int(config["sample_size"]),
        "patch_size": int(config["patch_size"]),
        "num_embeds_ada_norm": int(config["num_classes"]),
        "norm_eps": float(config["mlp_norm_eps"]),
        **FIXED,
    }


def places_table(hidden: int, side: int) -> Tensor:
    """(1, side * side, C) sinusoids of the places, as the original computes them once and stores them."""
    table = get_2d_sincos_pos_embed(hidden, side, base_size=side, interpolation_scale=1, output_type="pt")
    return torch.as_tensor(table).float()[None]


class _Original(LazyTensors):
    """Tensors of diffusers' layout under the original's keys, with the table of positions.

    Args:
        tensors: In diffusers' layout.
        depth: Number of blocks.
        table: Of the positions.
    """

    def __init__(self, tensors: Mapping[str, Tensor], depth: int, table: Tensor) -> None:
        self._stored = lazily(tensors)
        self._depth = depth
        self._table = table
        self._renamed = Rearranged(self._stored, {**_layout(self._stored, depth)})

    def __getitem__(self, key: str) -> Tensor:
        if key == PLACES:
            return self._table
        if key in EMBEDDERS:
            self._check_copies(EMBEDDERS[key])
        return self._renamed[key]

    def __iter__(self) -> Iterator[str]:
        yield PLACES
        yield from self._renamed

    def __len__(self) -> int:
        return len(self._renamed) + 1

    def spec(self, key: str) -> TensorSpec:
        """See `LazyTensors`."""
        if key == PLACES:
            return TensorSpec(tuple(self._table.shape), self._table.dtype)
        return self._renamed.spec(key)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """See `LazyTensors`."""
        return self[key][start:stop]

    def _check_copies(self, name: str) -> None:
        """The blocks' embedders are one embedder in the original: they must be the same."""
        first = self._stored[f"transformer_blocks.0{EMBEDDER}{name}"]
        for number in range(1, self._depth):
            key = f"transformer_blocks.{number}{EMBEDDER}{name}"
            copy = self._stored[key]
            if first.is_meta:
                continue  # shapes alone, of an inspection
            if not torch.equal(first, copy):
                raise DyditError(
                    f"The embedders of the blocks differ: '{key}' is not that of block 0.",
                    why="diffusers' DiT holds a copy of the timestep's and the class's embedder in every block; a fine-tuning that "
                    "trained each for itself has made another model of it, which the original's form cannot hold.",
                    fix="Bring the checkpoint from before that fine-tuning, or one in which the embedders were frozen.",
                )


def _layout(tensors: LazyTensors, depth: int) -> Layout:
    """Ours -> the rows of theirs.

    Raises:
        DyditError: If there are keys that diffusers' DiT does not have.
    """
    layout: dict[str, tuple[Rows, ...]] = {}
    for ours, theirs in OUTER.items():
        layout |= {f"{ours}.{kind}": (Rows(f"{theirs}.{kind}"),) for kind in ("weight", "bias")}
    for ours, theirs in EMBEDDERS.items():
        layout[ours] = (Rows(f"transformer_blocks.0{EMBEDDER}{theirs}"),)
    for number in range(depth):
        mine, block = f"blocks.{number}.", f"transformer_blocks.{number}."
        for kind in ("weight", "bias"):
            layout |= {
                f"{mine}{ours}.{kind}": (Rows(f"{block}{theirs}.{kind}"),) for ours, theirs in INNER.items()
            }
            layout[f"{mine}attn.qkv.{kind}"] = tuple(Rows(f"{block}{part}.{kind}") for part in FUSED)
    used = {part.key for parts in layout.values() for part in parts}
    unknown = [key for key in tensors if key not in used and EMBEDDER not in key and key != OLD_TABLE]
    if unknown:
        raise DyditError(
            f"The checkpoint holds {len(unknown)} tensors that diffusers' DiT does not have.",
            why=f"The first is '{unknown[0]}'; leaving it out would change what the model computes.",
            fix="Bring the state dict of a DiTTransformer2DModel, adapters merged.",
        )
    return layout


def _check_kind(config: Mapping[str, Any]) -> None:
    name = config.get("_class_name")
    if name is not None and name not in CLASSES:
        raise DyditError(
            f"The config.json beside the weights is of a {name}.",
            why=f"Weights with these keys belong to {' or '.join(CLASSES)}.",
            fix="Put the configuration beside the weights that belongs to them.",
        )
    for key, expected in FIXED.items():
        if config.get(key, expected) != expected:
            raise DyditError(
                f"The checkpoint's config.json sets {key} to {config[key]!r}.",
                why=f"The published DiT has {expected!r}, and dydit knows no others.",
                fix="Bring a DiT of the published form.",
            )


def _geometry(tensors: Mapping[str, Tensor], hints: Hints) -> dict[str, Any]:
    check_axes(tensors, AXES)
    specs, config = lazily(tensors).specs, hints.config
    if "sample_size" not in config and OLD_TABLE not in specs:
        raise DyditError(
            "The resolution of this diffusers DiT is not known.",
            why="Its weights hold no table of positions; the config.json beside them says it.",
            fix="Pass the folder with config.json and the weights, not the weight file alone.",
        )
    hidden, in_channels, patch, _ = specs["pos_embed.proj.weight"].shape
    heads = int(hints.num_heads or config.get("num_attention_heads") or heads_of(hidden, hints))
    side = (
        int(config["sample_size"])
        if "sample_size" in config
        else math.isqrt(specs[OLD_TABLE].shape[-2]) * patch
    )
    computed = specs["proj_out_2.weight"].shape[0] // patch**2
    return {
        "sample_size": side,
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": hidden,
        "num_layers": depth_of(tensors, BLOCK_KEY),
        "num_attention_heads": heads,
        "num_classes": specs[DIFFUSERS_KEYS[1]].shape[0] - 1,
        "mlp_hidden_size": specs["transformer_blocks.0.ff.net.0.proj.weight"].shape[0],
        "learn_sigma": computed == 2 * in_channels,
        "num_groups": hints.num_groups,
        "always_on": True,
        "frequency_shift": FREQUENCY_SHIFT,
        "mlp_norm_eps": float(config.get("norm_eps", DEFAULT_EPS)),
    }
