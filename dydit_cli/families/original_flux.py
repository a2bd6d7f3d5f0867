"""FLUX's two file layouts: the original single file (black-forest-labs/flux) and diffusers' `FluxTransformer2DModel`.

The model keeps diffusers' keys, so that foreign LoRAs find their layers. The layouts differ in names, in fused projections (the
original's ``qkv`` and ``linear1`` are several of diffusers' in one) and in the order of the two halves of the last modulation
(shift|scale in the original, scale|shift in diffusers: weight and bias alike). Both maps are data (`checkpoints/layout.py`), so
that a file can be converted a tensor at a time, and each undoes the other bit for bit.

Depth, width, head size and the rest are read from the tensors, so that siblings cut in depth (FLUX-lite with 8 + 38 blocks,
flux-mini with 5 + 10) and wider inputs (Fill's 384 channels) need no table. Only the split of a head's channels over the three
rotary axes leaves no trace: it is 16 + 56 + 56 for heads of 128 channels, as in every published FLUX, and must be given for others.

The authors' dynamic FLUX stores diffusers' keys, and in every block a ``token_selection`` with ``linear_t``, ``norm`` and
``router``. It becomes our ``token_router``, with the names of its parts kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from dydit_cli.checkpoints.layout import Layout, Rearranged, Rows
from dydit_cli.checkpoints.lazy import TensorSpec, lazily
from dydit_cli.errors import DyditError
from dydit_cli.families.family import Hints, Source
from dydit_cli.families.original_flux_routers import file_key, our_key, routed_config
from dydit_cli.families.unit_weights import UnitWeights, flux_units

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
AUTHORS_ROUTER, OUR_ROUTER = ".token_selection.", ".token_router."

# How a head's channels are shared out among the rotary axes: every published FLUX has heads of 128.
AXES_BY_HEAD_DIM = {128: (16, 56, 56)}

# Layers that are the same in both layouts: original -> diffusers. Each has a weight and a bias.
OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
GUIDANCE = {
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}
DOUBLE_LAYERS = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
SINGLE_LAYERS = {"modulation.lin": "norm.linear", "linear2": "proj_out"}

# The fused layers: original -> its parts in the order of their rows.
DOUBLE_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
SINGLE_FUSED = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}

# The norms of queries and keys, which have a scale and nothing else.
DOUBLE_NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
SINGLE_NORMS = {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}

MODULATION = ("final_layer.adaLN_modulation.1", "norm_out.linear")

ORIGINAL_KEYS = ("img_in.weight", "double_blocks.0.img_attn.qkv.weight", "final_layer.linear.weight")
DIFFUSERS_KEYS = (
    "x_embedder.weight",
    "context_embedder.weight",
    "transformer_blocks.0.attn.add_q_proj.weight",
    "transformer_blocks.0.ff_context.net.2.weight",
    "norm_out.linear.weight",
)


def recognises_original(keys: Iterable[str]) -> bool:
    """Whether the keys are those of the original single-file layout."""
    return set(ORIGINAL_KEYS) <= set(keys)


def recognises_diffusers(keys: Iterable[str]) -> bool:
    """Whether the keys are those of diffusers' `FluxTransformer2DModel`, dynamic or not.

    Stable Diffusion 3 has blocks of the same names; its inputs are patches (``pos_embed.proj``), not an ``x_embedder``.
    """
    return set(DIFFUSERS_KEYS) <= set(keys)


def layout_of(keys: Iterable[str]) -> str:
    """``original`` (one file) or ``diffusers``."""
    return "original" if recognises_original(keys) else "diffusers"


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are a FLUX in either layout."""
    return recognises_original(tensors) or recognises_diffusers(tensors)


def has_authors_routers(keys: Iterable[str]) -> bool:
    """Whether the file is the authors' dynamic FLUX (token routers of 4C x C in every block, under their name)."""
    return any(AUTHORS_ROUTER in key for key in keys)


def read(tensors: Mapping[str, Tensor], hints: Hints) -> Source:
    """Infer the configuration and give the tensors our keys, without reading any: they are made when asked for.

    Raises:
        DyditError: If tensors are missing, left over or do not fit each other, or the rotary axes cannot be told.
    """
    specs = lazily(tensors).specs
    if not recognises_original(specs):
        renamed = Rearranged(tensors, _ours(specs))
        config = geometry(renamed.specs, hints)
        authors = has_authors_routers(specs)
        if authors:
            # What they released routes tokens only.
            config |= {"width": False, "token_router": "authors"}
        return Source(config=config, tensors=renamed, dynamic=authors)
    ours = {key: name for key in specs if (name := our_key(key)) is not None}
    static = to_diffusers({key: spec for key, spec in specs.items() if key not in ours})
    renamed = Rearranged(tensors, {**static, **{name: (Rows(key),) for key, name in ours.items()}})
    config = geometry(renamed.specs, hints)
    if ours:
        routers = {name: specs[key] for key, name in ours.items()}
        config |= routed_config(routers, config["num_attention_heads"])
    return Source(config=config, tensors=renamed, dynamic=bool(ours))


def write(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a state dict the layout in which others expect it: see `layout_for_others`.

    Raises:
        DyditError: If keys of a model have no place in that layout.
    """
    return dict(Rearranged(state, layout_for_others(lazily(state).specs)))


def layout_for_others(specs: Mapping[str, TensorSpec]) -> Layout:
    """How to make a file that others can use of a model's tensors.

    Token routers of the authors' kind get the authors' layout, which is diffusers' with their name for that router. Everything
    else gets the original single file's; routers and orders of ours stand beside its tensors (`original_flux_routers.py`).

    Raises:
        DyditError: If there are keys that the model does not have.
    """
    if any(f"{OUR_ROUTER}linear_t." in key for key in specs):
        return {key.replace(OUR_ROUTER, AUTHORS_ROUTER): (Rows(key),) for key in specs}
    ours = {key: (Rows(key),) for key in specs if is_ours(key)}
    layout = to_original({key: spec for key, spec in specs.items() if key not in ours})
    return {**layout, **{file_key(key): rows for key, rows in ours.items()}}


def to_diffusers(specs: Mapping[str, TensorSpec]) -> Layout:
    """How to make diffusers' tensors of the original ones.

    Raises:
        DyditError: If there are keys that the original layout does not have.
    """
    hidden = _hidden(specs, "img_in.weight")
    layout: dict[str, tuple[Rows, ...]] = {}
    for theirs, ours in _same_layers(specs, original=True):
        layout[ours] = (Rows(theirs),)
    for theirs, parts in _fused_layers(specs, original=True):
        starts = [hidden * index for index in range(len(parts))]
        stops = [*starts[1:], _rows_of(specs, theirs)]
        for part, start, stop in zip(parts, starts, stops, strict=True):
            layout[part] = (Rows(theirs, start, stop),)
    layout |= _swapped(*MODULATION, hidden)
    _refuse_leftovers(specs, layout, "original")
    return layout


def to_original(specs: Mapping[str, TensorSpec]) -> Layout:
    """How to make the original tensors of diffusers' ones.

    Raises:
        DyditError: If there are keys that diffusers' layout does not have, such as routers and orders.
    """
    hidden = _hidden(specs, "x_embedder.weight")
    layout: dict[str, tuple[Rows, ...]] = {}
    for theirs, ours in _same_layers(specs, original=False):
        layout[theirs] = (Rows(ours),)
    for theirs, parts in _fused_layers(specs, original=False):
        layout[theirs] = tuple(Rows(part) for part in parts)
    layout |= _swapped(MODULATION[1], MODULATION[0], hidden)
    _refuse_leftovers(specs, layout, "diffusers'")
    return layout


def geometry(specs: Mapping[str, TensorSpec], hints: Hints) -> dict[str, Any]:
    """Infer the model's configuration from shapes in diffusers' layout, under diffusers' names and ``mlp_hidden_size``.

    Raises:
        DyditError: If shapes are missing or contradict each other, or heads have other than 128 channels and no hint says how
            the rotary axes share them.
    """
    hidden, in_channels = _matrix(specs, "x_embedder.weight")
    head_dim = _length(specs, f"{DOUBLE}.0.attn.norm_q.weight")
    if hidden % head_dim:
        raise DyditError(
            f"Heads of {head_dim} channels do not divide a width of {hidden}.",
            why=f"The width is that of 'x_embedder.weight', the head size the length of '{DOUBLE}.0.attn.norm_q.weight'.",
            fix="Save the state dict of the whole model again.",
        )
    heads = hidden // head_dim
    if hints.num_heads not in (None, heads):
        raise DyditError(
            f"The file's model has {heads} attention heads, not {hints.num_heads}.",
            why=f"FLUX normalises queries and keys inside a head, and its scales are of length {head_dim}.",
            fix="Leave --num-heads out.",
        )
    return {
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": _matrix(specs, "proj_out.weight")[0],
        "num_layers": _depth(specs, DOUBLE),
        "num_single_layers": _depth(specs, SINGLE),
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": _matrix(specs, "context_embedder.weight")[1],
        "pooled_projection_dim": _matrix(specs, "time_text_embed.text_embedder.linear_1.weight")[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in specs,
        "axes_dims_rope": rope_axes(head_dim, hints.axes_dims_rope or hints.config.get("axes_dims_rope")),
        "mlp_hidden_size": _mlp_hidden(specs),
        "num_groups": hints.num_groups,
    }


def units_of(config: Mapping[str, Any]) -> tuple[UnitWeights, ...]:
    """Where the units of a model of such a configuration keep their weights, block by block."""
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    return tuple(
        flux_units(
            config["num_layers"],
            config["num_single_layers"],
            hidden,
            config["num_attention_heads"],
            config["mlp_hidden_size"],
        )
    )


def rope_axes(head_dim: int, given: tuple[int, ...] | None = None) -> tuple[int, int, int]:
    """The channels of a head that turn with each of the three position indices.

    No tensor tells them, and a wrong split gives another model without a complaint; so nothing is guessed.

    Args:
        head_dim: Channels of a head.
        given: What a ``config.json`` or the user says.

    Raises:
        DyditError: If heads are not of 128 channels and nothing is given, or what is given does not fit.
    """
    axes = given or AXES_BY_HEAD_DIM.get(head_dim)
    if axes is None:
        raise DyditError(
            f"The rotary axes of heads of {head_dim} channels are not known.",
            why="No tensor tells how a head's channels are shared among the three axes; 16, 56, 56 is FLUX's split of 128.",
            fix="Bring the folder with the model's config.json, or give axes_dims_rope, three even numbers that add up to "
            f"{head_dim}.",
        )
    if len(axes) != 3 or sum(axes) != head_dim or any(size < 0 or size % 2 for size in axes):
        raise DyditError(
            f"The rotary axes {', '.join(map(str, axes))} do not fit heads of {head_dim} channels.",
            why="Three even numbers are needed that add up to a head's channels.",
            fix=f"Give axes_dims_rope so that they add up to {head_dim}.",
        )
    return axes[0], axes[1], axes[2]


def _ours(specs: Mapping[str, TensorSpec]) -> Layout:
    """Diffusers' layout as it stands, the authors' routers under our name."""
    layout = {key.replace(AUTHORS_ROUTER, OUR_ROUTER): (Rows(key),) for key in specs}
    static = {key: parts for key, parts in layout.items() if not is_ours(key)}
    # The way back names every key that a static FLUX has, so that it tells what is missing or left over.
    to_original({key: specs[parts[0].key] for key, parts in static.items()})
    return layout


def is_ours(key: str) -> bool:
    """Whether a key is a router's or an order's, under our names."""
    return "_router." in key or key.endswith("_order")


def _same_layers(specs: Mapping[str, TensorSpec], *, original: bool) -> Iterator[tuple[str, str]]:
    """(original key, diffusers key) of every tensor that is the same in both."""
    guided = next(iter(GUIDANCE if original else GUIDANCE.values())) + ".weight" in specs
    for theirs, ours in {**OUTER, **(GUIDANCE if guided else {})}.items():
        yield from _weight_and_bias(theirs, ours)
    for theirs, ours in _blocks(specs, original=original):
        double = ours.startswith(DOUBLE)
        for layer, name in (DOUBLE_LAYERS if double else SINGLE_LAYERS).items():
            yield from _weight_and_bias(f"{theirs}.{layer}", f"{ours}.{name}")
        for scale, name in (DOUBLE_NORMS if double else SINGLE_NORMS).items():
            yield f"{theirs}.{scale}", f"{ours}.{name}"


def _fused_layers(
    specs: Mapping[str, TensorSpec], *, original: bool
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(original key, diffusers keys of its parts) of every fused tensor."""
    for theirs, ours in _blocks(specs, original=original):
        fused = DOUBLE_FUSED if ours.startswith(DOUBLE) else SINGLE_FUSED
        for layer, names in fused.items():
            for kind in ("weight", "bias"):
                yield f"{theirs}.{layer}.{kind}", tuple(f"{ours}.{name}.{kind}" for name in names)


def _blocks(specs: Mapping[str, TensorSpec], *, original: bool) -> Iterator[tuple[str, str]]:
    """(original prefix, diffusers prefix) of every block."""
    for theirs, ours in (("double_blocks", DOUBLE), ("single_blocks", SINGLE)):
        for index in range(_depth(specs, theirs if original else ours)):
            yield f"{theirs}.{index}", f"{ours}.{index}"


def _weight_and_bias(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for kind in ("weight", "bias"):
        yield f"{theirs}.{kind}", f"{ours}.{kind}"


def _swapped(source: str, target: str, hidden: int) -> dict[str, tuple[Rows, ...]]:
    """The last modulation with its halves exchanged, which is its own inverse."""
    return {
        f"{target}.{kind}": (
            Rows(f"{source}.{kind}", hidden, 2 * hidden),
            Rows(f"{source}.{kind}", 0, hidden),
        )
        for kind in ("weight", "bias")
    }


def _refuse_leftovers(specs: Mapping[str, TensorSpec], layout: Layout, name: str) -> None:
    used = {part.key for parts in layout.values() for part in parts}
    extra, missing = [key for key in specs if key not in used], [key for key in used if key not in specs]
    if extra or missing:
        parts = [
            f"{len(keys)} {what} ({'; '.join(sorted(keys)[:3])}{' ...' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("not known", extra))
            if keys
        ]
        raise DyditError(
            f"The tensors are not those of a FLUX in the {name} layout.",
            why=f"Of the keys, {' and '.join(parts)}.",
            fix="Bring the transformer's whole state dict, and nothing beside it.",
        )


def _depth(specs: Mapping[str, TensorSpec], prefix: str) -> int:
    pattern = re.compile(rf"{prefix}\.(\d+)\.")
    numbers = {int(match[1]) for key in specs if (match := pattern.match(key))}
    if numbers and max(numbers) != len(numbers) - 1:
        raise DyditError(
            f"The checkpoint holds {len(numbers)} of the '{prefix}', the last of which is number {max(numbers)}.",
            why="Blocks are numbered from 0 without gaps, so that some are missing.",
            fix="Save the state dict of the whole model again.",
        )
    return len(numbers)


def _mlp_hidden(specs: Mapping[str, TensorSpec]) -> int:
    sizes = {
        _matrix(specs, key)[0]
        for index in range(_depth(specs, DOUBLE))
        for key in (
            f"{DOUBLE}.{index}.ff.net.0.proj.weight",
            f"{DOUBLE}.{index}.ff_context.net.0.proj.weight",
        )
    } | {_matrix(specs, f"{SINGLE}.{index}.proj_mlp.weight")[0] for index in range(_depth(specs, SINGLE))}
    if len(sizes) != 1:
        raise DyditError(
            f"The MLPs of the checkpoint are of several widths: {', '.join(map(str, sorted(sizes)))}.",
            why="In FLUX the MLPs of both streams and of the single blocks are equally wide.",
            fix="Bring a model whose MLPs were not pruned.",
        )
    return sizes.pop()


def _hidden(specs: Mapping[str, TensorSpec], key: str) -> int:
    return _matrix(specs, key)[0]


def _rows_of(specs: Mapping[str, TensorSpec], key: str) -> int:
    return specs[key].shape[0] if key in specs and specs[key].shape else 0


def _matrix(specs: Mapping[str, TensorSpec], key: str) -> tuple[int, int]:
    shape = _shape(specs, key, 2)
    return shape[0], shape[1]


def _length(specs: Mapping[str, TensorSpec], key: str) -> int:
    return _shape(specs, key, 1)[0]


def _shape(specs: Mapping[str, TensorSpec], key: str, axes: int) -> tuple[int, ...]:
    shape = specs[key].shape if key in specs else None
    if shape is None or len(shape) != axes or 0 in shape:
        raise DyditError(
            f"The tensor '{key}' of the checkpoint {f'is of shape {shape}' if shape is not None else 'is missing'}.",
            why=f"The geometry of the model is read from its {axes} axes, none of which may be empty.",
            fix="Save the state dict of the whole model again.",
        )
    return shape
