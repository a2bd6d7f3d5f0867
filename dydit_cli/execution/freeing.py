"""Give the stored weights of sliced layers back once they are packed: inference then holds them once, not twice.

The slabs that compact execution reads are the stored weights in another order, so nothing is lost: `restore_weights` puts every bit
back. Meanwhile the parameters stand there without memory (on torch's "meta" device), with their names, shapes and types; whatever
would need their values must be refused, because it would get none.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor, nn

from dydit_cli.dynamic.layers import DynamicAttention, DynamicMlp
from dydit_cli.errors import DyditError
from dydit_cli.execution.slabs import FreedWeights, Slabs, SlicedLayer, freed_of, pack


@singledispatch
def stored_weights(layer: SlicedLayer, slabs: Slabs) -> dict[str, Tensor]:
    """The inverse of `pack`: what slabs in the order of ranks hold, as stored; each kind of layer registers how.

    Raises:
        DyditError: For a kind of layer that has not.
    """
    raise DyditError(
        f"The weights of a {type(layer).__qualname__} cannot be freed.",
        why="Nothing says how they would be put back.",
        fix="Call model.pack() without free=True.",
    )


@stored_weights.register
def stored_attention(attention: DynamicAttention, slabs: Slabs) -> dict[str, Tensor]:
    """qkv and the columns of the output projection."""
    heads, dim, order = attention.num_heads, attention.head_dim, attention.head_order
    channels = slabs.entry.shape[2]
    entry = slabs.entry.view(heads, 3, dim, channels).transpose(0, 1)
    bias = slabs.entry_bias.view(heads, 3, dim).transpose(0, 1)
    leave = slabs.leave.permute(2, 0, 1)
    return {
        "qkv.weight": torch.empty_like(entry).index_copy_(1, order, entry).reshape(3 * heads * dim, channels),
        "qkv.bias": torch.empty_like(bias).index_copy_(1, order, bias).reshape(3 * heads * dim),
        "proj.weight": torch.empty_like(leave).index_copy_(1, order, leave).reshape(-1, heads * dim),
    }


@stored_weights.register
def stored_mlp(mlp: DynamicMlp, slabs: Slabs) -> dict[str, Tensor]:
    """fc1 and the columns of fc2."""
    order = mlp.channel_order
    entry, bias, leave = slabs.entry.flatten(0, 1), slabs.entry_bias.flatten(), slabs.leave.flatten(0, 1).t()
    return {
        "fc1.weight": torch.empty_like(entry).index_copy_(0, order, entry),
        "fc1.bias": torch.empty_like(bias).index_copy_(0, order, bias),
        "fc2.weight": torch.empty_like(leave).index_copy_(1, order, leave),
    }


def free_weights(layer: SlicedLayer) -> None:
    """Pack a layer and give its stored weights back; nothing happens if that was done already.

    Raises:
        DyditError: If slabs do not hold the stored weights bit for bit, as under an adapter, or if a gradient is wanted.
    """
    if freed_of(layer) is not None:
        return
    with torch.inference_mode(False), torch.no_grad():
        slabs = pack(layer)
        found = stored_weights(layer, slabs)
        module = _module(layer)
        stored = dict(module.named_parameters())
        for name, tensor in found.items():
            if name not in stored or not same_bits(tensor, stored[name]):
                raise DyditError(
                    "Weights that an adapter changes cannot be freed.",
                    why="What is packed is not what is stored, so that the stored weights could not be put back.",
                    fix="Remove the adapter or merge it into the weights first, or call model.pack() without free=True.",
                )
        if any(stored[name].requires_grad for name in found):
            raise DyditError(
                "Weights that are being trained cannot be freed.",
                why="Their gradients belong to the stored weights.",
                fix="Call model.requires_grad_(False) first if the model is only to be run.",
            )
        for name, tensor in found.items():
            _put(module, name, torch.empty_like(tensor, device="meta"))
        module.freed_weights = FreedWeights(  # type: ignore[assignment]
            slabs,
            tuple(range(len(slabs.entry))),
            tuple(found),
            next(name for name, parameter in module.named_parameters() if parameter is slabs.leave_bias),
            {name: buffer.clone() for name, buffer in module.named_buffers()},
        )


def restore_weights(layer: SlicedLayer) -> None:
    """Put the stored weights of a layer back, bit for bit; nothing happens if they are there."""
    freed = freed_of(layer)
    if freed is None:
        return
    with torch.inference_mode(False), torch.no_grad():
        module = _module(layer)
        for name, tensor in stored_weights(layer, freed.by_rank()).items():
            _put(module, name, tensor.contiguous())
        del module.freed_weights


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in every bit, NaN and the sign of zero included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


def _module(layer: SlicedLayer) -> nn.Module:
    if not isinstance(layer, nn.Module):
        raise TypeError(f"a {type(layer).__qualname__} holds no parameters")
    return layer


def _put(module: nn.Module, name: str, values: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
