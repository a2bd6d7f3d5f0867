"""Weights that torchao keeps in int8: what compact execution reads of them.

Weight-only int8 has one scale for each row of a weight, so that it is cut by unit like any other: rows take their scales along, and
columns share those of the rows that they cross. Numbers become floats where they are multiplied, a layer at a time.

torchao is not imported here: weights of its kind exist only where somebody else has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor


def is_quantised(tensor: object) -> bool:
    """Whether torchao keeps the tensor in a form of its own."""
    utils = sys.modules.get("torchao.utils")
    return utils is not None and isinstance(tensor, utils.TorchAOBaseTensor)


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """(out, in) int8 values and (out,) scales whose products are a quantised weight; None if it is kept otherwise."""
    kind = getattr(sys.modules.get("torchao.quantization"), "Int8Tensor", None)
    if kind is None or not isinstance(weight, kind):
        return None
    held: Any = weight
    # Older versions of torchao have less to say.
    values, scale, zero = held.qdata, held.scale, getattr(held, "zero_point", None)
    # Activations that are quantised too, or scaled, are more than a weight.
    more = any(getattr(held, name, None) is not None for name in ("act_quant_kwargs", "act_pre_scale"))
    by_row = scale.numel() == len(values) and tuple(held.block_size) == (1, values.shape[1])
    if more or not by_row or (zero is not None and bool(zero.any())):
        return None
    return values, scale.flatten().to(weight.dtype)


def plain(weight: Tensor) -> Tensor:
    """A weight as floats: itself unless torchao keeps it."""
    if not is_quantised(weight):
        return weight
    held: Any = weight
    restored: Tensor = held.dequantize()
    return restored


def with_values(weight: Tensor, values: Tensor) -> Tensor:
    """A weight of `int8_rows` with other (out, in) int8 values, everything else as it is."""
    held: Any = weight
    names, about = held.__tensor_flatten__()
    parts = {name: getattr(held, name) for name in names} | {"qdata": values}
    found: Tensor = type(held).__tensor_unflatten__(parts, about, held.shape, held.stride())
    return found


def parts_of_tensor(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a tensor's numbers: itself, or what torchao keeps in its place."""
    if not is_quantised(tensor):
        yield tensor
        return
    held: Any = tensor
    for name in held.__tensor_flatten__()[0]:
        yield from parts_of_tensor(getattr(held, name))
