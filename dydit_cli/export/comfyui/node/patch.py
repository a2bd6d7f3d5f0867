"""Put the routers between ComfyUI's model and its blocks, in the two ways that ComfyUI offers.

A *wrapper* of the diffusion model sees each step's timestep: it decides the widths of all blocks and hands them on in the step's
``transformer_options``. A *replacement* of each block (``patches_replace["dit"]``) finds them there and computes the block. Nothing is
kept between steps but the routers themselves, and the model's modules are not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .blocks import Call, double, single
from .checks import check_model, refuse_patches
from .host import Host
from .problems import NodeError
from .routers import BlockRouters, Parts, Routers, Width

KEY = "dydit"
WRAPPER = "diffusion_model"
"""``comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL``."""
KINDS = {True: "double_block", False: "single_block"}
FREQUENCIES = 256
LONGEST_PERIOD = 10000.0
TIME_FACTOR = 1000.0

Replacement = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


@dataclass
class Step:
    """What the wrapper hands to the blocks of one forward.

    Attributes:
        flux: The model that runs.
        routers: On its device.
        widths: Of each block.
        keep_bias: Added to all logits.
        text_length: Tokens of text; known once a block of two streams has run.
    """

    flux: Any
    routers: Routers
    widths: Sequence[Parts]
    keep_bias: float
    text_length: int = 0


def patched(model: Any, routers: Routers, keep_bias: float, host: Host) -> Any:
    """A clone of ComfyUI's MODEL whose blocks run dynamically.

    Args:
        model: A ``ModelPatcher``.
        routers: Of its file.
        keep_bias: Added to all logits.
        host: See `Host`.

    Raises:
        NodeError: If the routers are not for this model, or another node has replaced its blocks.
    """
    flux = model.get_model_object("diffusion_model")
    check_model(flux, routers.shape, host)
    clone = model.clone()
    taken = clone.model_options.get("transformer_options", {}).get("patches_replace", {}).get("dit", {})
    for is_double, count in ((True, routers.shape.double), (False, routers.shape.single)):
        for index in range(count):
            if (KINDS[is_double], index) in taken:
                raise NodeError(
                    "Another node has already replaced this model's blocks.",
                    why="A block can be replaced once, and this node computes it itself.",
                    fix="Use one of the two: connect this node to the model as the loader gives it.",
                )
            block = replacement(
                index, host, is_double=is_double, first=0 if is_double else routers.shape.double
            )
            clone.set_model_patch_replace(block, "dit", KINDS[is_double], index)
    clone.add_wrapper_with_key(WRAPPER, KEY, wrapper(routers, keep_bias))
    return clone


def wrapper(routers: Routers, keep_bias: float) -> Callable[..., Any]:
    """What runs around the diffusion model's forward. (A function, because ComfyUI copies objects deeply with their model.)"""

    def run(executor: Any, x: Tensor, timestep: Tensor, *arguments: Any, **keywords: Any) -> Any:
        by_keyword = "transformer_options" in keywords
        options = keywords["transformer_options"] if by_keyword else (arguments or (None,))[-1]
        if not isinstance(options, dict):
            raise _too_old("its FLUX does not hand transformer_options to wrappers as expected")
        refuse_patches(options)
        flux, here = executor.class_obj, routers.on(x.device)
        embedding = flux.time_in(sinusoids(timestep).to(x.dtype))
        told = {**options, KEY: Step(flux, here, here.widths(embedding, keep_bias), keep_bias)}
        if by_keyword:
            return executor(x, timestep, *arguments, **{**keywords, "transformer_options": told})
        return executor(x, timestep, *arguments[:-1], told, **keywords)

    return run


def replacement(index: int, host: Host, *, is_double: bool, first: int) -> Replacement:
    """What runs in place of a block.

    Args:
        index: Number of the block among its kind.
        host: See `Host`.
        is_double: Its kind.
        first: Number of the first block of its kind among all.
    """

    def run(arguments: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        options = arguments.get("transformer_options") or {}
        step = options.get(KEY)
        if step is None:
            raise _too_old("its FLUX calls no wrappers, or hands no transformer_options to replaced blocks")
        routers, parts = step.routers.blocks[first + index], step.widths[first + index]
        if is_double:
            block, step.text_length = step.flux.double_blocks[index], arguments["txt"].shape[1]
            image, text = run_double(block, routers, parts, arguments, step.keep_bias, host)
            return {"img": image, "txt": text}
        # ComfyUI says where the image begins; before it did, the last block of two streams knew.
        length = options["img_slice"][0] if "img_slice" in options else step.text_length
        block = step.flux.single_blocks[index]
        return {"img": run_single(block, routers, parts, arguments, length, step.keep_bias, host)}

    return run


def run_double(
    block: Any, routers: BlockRouters, parts: Parts, arguments: dict[str, Any], keep_bias: float, host: Host
) -> tuple[Tensor, Tensor]:
    """Run a block of two streams, samples of one width at a time."""
    image, text = arguments["img"], arguments["txt"]
    call = call_of(routers, arguments, len(image), keep_bias)
    if len(parts) == 1:
        return double(block, host, image, text, some(call, *parts[0]))
    images, texts = torch.empty_like(image), torch.empty_like(text)
    for rows, width in parts:
        images[rows], texts[rows] = double(block, host, image[rows], text[rows], some(call, rows, width))
    return images, texts


def run_single(
    block: Any,
    routers: BlockRouters,
    parts: Parts,
    arguments: dict[str, Any],
    length: int,
    keep_bias: float,
    host: Host,
) -> Tensor:
    """Run a block of one stream, samples of one width at a time; ``length`` tokens are text."""
    tokens = arguments["img"]
    call = call_of(routers, arguments, len(tokens), keep_bias)
    if len(parts) == 1:
        return single(block, host, tokens, length, some(call, *parts[0]))
    done = torch.empty_like(tokens)
    for rows, width in parts:
        done[rows] = single(block, host, tokens[rows], length, some(call, rows, width))
    return done


def call_of(routers: BlockRouters, arguments: dict[str, Any], batch: int, keep_bias: float) -> Call:
    """What ComfyUI's arguments of a block say, of a width that is yet to be filled in.

    Raises:
        NodeError: If the conditioning or the positions are not of FLUX.1's form.
    """
    conditioning, rope, mask = arguments["vec"], arguments["pe"], arguments.get("attn_mask")
    if (
        not isinstance(conditioning, Tensor)
        or conditioning.ndim != 2
        or len(conditioning) != batch
        or rope is None
    ):
        raise NodeError(
            "The model is run in a way that its routers do not know.",
            why="Its conditioning is not one vector a sample (as with reference latents at a timestep of their own).",
            fix="Choose another method for the reference latents, or take out 'Apply dydit'.",
        )
    if mask is not None and mask.ndim < 4:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
    shape = routers.shape

    def keep(image: Tensor, text: Tensor, vector: Tensor) -> Tensor:
        return routers.keep(image, text, vector, keep_bias)

    return Call(
        heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
        mlp=shape.mlp,
        width=Width(),
        keep=keep,
        conditioning=conditioning,
        rope=rope[:, 0],
        mask=mask,
        options=arguments.get("transformer_options") or {},
    )


def some(call: Call, rows: Tensor | None, width: Width) -> Call:
    """The call for the samples of one width; None for all of them."""
    if rows is None:
        return replace(call, width=width)

    def chosen(values: Tensor) -> Tensor:
        return values if len(values) == 1 else values[rows]

    return replace(
        call,
        width=width,
        conditioning=call.conditioning[rows],
        rope=chosen(call.rope),
        mask=None if call.mask is None else chosen(call.mask),
    )


def sinusoids(timestep: Tensor) -> Tensor:
    """(B,) t in [0, 1] -> (B, 256) fp32: cosines, then sines, of 1000 t at geometric frequencies."""
    half = FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angles = TIME_FACTOR * timestep.float()[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _too_old(what: str) -> NodeError:
    return NodeError(
        "This ComfyUI does not have the interface that the node needs.",
        why=f"It is too old, or too new: {what}.",
        fix="Update ComfyUI and this folder; README.md names the version that it was written for.",
    )
