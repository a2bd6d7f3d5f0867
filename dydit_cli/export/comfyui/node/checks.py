"""What the node refuses: models of another form or shape, and patches that it would leave out."""

from __future__ import annotations

from typing import Any

from torch import nn

from .host import Host
from .problems import NodeError
from .routers import Shape

INSIDE = ("attn1_patch", "attn1_output_patch")
"""Patches of other nodes that ComfyUI calls inside a block, with tensors of all heads and tokens."""


def check_model(flux: Any, shape: Shape, host: Host) -> None:
    """See that a model is a FLUX.1 of the routers' shape, with weights that can be sliced.

    Raises:
        NodeError: If not.
    """
    blocks = [*getattr(flux, "double_blocks", ()), *getattr(flux, "single_blocks", ())]
    if not blocks or not all(_is_known(block) for block in blocks):
        raise NodeError(
            f"The model ({type(flux).__name__}) is not a FLUX.1.",
            why="Its blocks are built otherwise (FLUX.2, Chroma and Ovis are relatives of another form).",
            fix="Load the file that holds the routers with 'Load Diffusion Model' and connect that.",
        )
    found = Shape(
        int(flux.hidden_size),
        int(flux.num_heads),
        int(flux.single_blocks[0].mlp_hidden_dim) if len(flux.single_blocks) else shape.mlp,
        len(flux.double_blocks),
        len(flux.single_blocks),
    )
    if found != shape:
        raise NodeError(
            "The routers belong to another model.",
            why=f"They are for {_described(shape)}, and the model has {_described(found)}.",
            fix="Choose the file in this node that 'Load Diffusion Model' loads.",
        )
    for block in blocks:
        for layer in _sliced(block):
            host.refuse_layer(layer)


def refuse_patches(options: dict[str, Any]) -> None:
    """Raise for patches of other nodes that would be left out.

    Raises:
        NodeError: If there are any.
    """
    found = [name for name in INSIDE if (options.get("patches") or {}).get(name)]
    if found:
        raise NodeError(
            f"Another node patches the attention of this model ({', '.join(found)}).",
            why="It expects all heads and tokens, of which some are not computed here.",
            fix="Use one of the two nodes.",
        )


def _is_known(block: Any) -> bool:
    """Whether a block is FLUX.1's, of either kind."""
    if hasattr(block, "linear1"):
        gelu, modulated = getattr(block, "mlp_act", None), getattr(block, "modulation", None)
        return _is_tanh_gelu(gelu) and hasattr(modulated, "lin")
    layers = [getattr(block, name, None) for name in ("img_mlp", "txt_mlp")]
    return all(hasattr(getattr(block, name, None), "lin") for name in ("img_mod", "txt_mod")) and all(
        isinstance(each, nn.Sequential) and len(each) == 3 and _is_tanh_gelu(each[1]) for each in layers
    )


def _is_tanh_gelu(layer: Any) -> bool:
    return isinstance(layer, nn.GELU) and layer.approximate == "tanh"


def _sliced(block: Any) -> list[Any]:
    """The layers of which rows or columns are taken."""
    if hasattr(block, "linear1"):
        return [block.linear1, block.linear2]
    attention = [layer for each in (block.img_attn, block.txt_attn) for layer in (each.qkv, each.proj)]
    return attention + [layer for each in (block.img_mlp, block.txt_mlp) for layer in (each[0], each[2])]


def _described(shape: Shape) -> str:
    return (
        f"{shape.double} + {shape.single} blocks of {shape.hidden} channels with {shape.heads} heads and MLPs of {shape.mlp} "
        "channels"
    )
