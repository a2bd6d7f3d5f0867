"""Files of 8-bit floats, plain and scaled, as bf16: a tensor (or a few of its rows) at a time.

Plain files are casts and nothing else; every 8-bit float is a bf16 number. Scaled files keep one scale a tensor (or one a row)
beside it, under the names of ComfyUI (``X.scale_weight``) or of compressed-tensors and ModelOpt (``X.weight_scale``): the weight
is their product, taken in fp32 and rounded once. Scales of activations and markers go: they mean nothing to bf16 weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dydit_cli.checkpoints.lazy import LazyTensors, TensorSpec
from dydit_cli.errors import DyditError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (".scale_weight", ".weight_scale")
DROPPED = (".scale_input", ".input_scale", ".comfy_quant")
MARKER = "scaled_fp8"
PLAIN, SCALED = "fp8", "scaled fp8"


def kind_of(tensors: LazyTensors) -> str:
    """``fp8``, ``scaled fp8``, or an empty string where nothing is to be done."""
    if any(key.endswith(SCALES) for key in tensors):
        return SCALED
    return PLAIN if any(tensors.spec(key).dtype in FLOAT8 for key in tensors if key != MARKER) else ""


class Dequantised(LazyTensors):
    """The tensors that an fp8 file stands for.

    Args:
        tensors: As stored.
        dtype: Type to give those that were quantised; the others keep theirs.

    Raises:
        DyditError: If a scale belongs to no tensor, or is of a shape that is neither one number nor one a row.
    """

    def __init__(self, tensors: LazyTensors, dtype: torch.dtype = torch.bfloat16) -> None:
        self._stored = tensors
        self._dtype = dtype
        self._scales = {
            key.removesuffix(ending) + ".weight": key
            for key in tensors
            for ending in SCALES
            if key.endswith(ending)
        }
        left_out = {*self._scales.values(), MARKER}
        self._specs = {
            key: self._spec_of(key) for key in tensors if key not in left_out and not key.endswith(DROPPED)
        }
        for key, scale in self._scales.items():
            self._check(key, scale)

    def __getitem__(self, key: str) -> Tensor:
        if not self._quantised(key):
            return self._stored[key]
        return self._product(key, self._stored[key], slice(None))

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def spec(self, key: str) -> TensorSpec:
        """See `LazyTensors`."""
        return self._specs[key]

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """See `LazyTensors`."""
        stored = self._stored.rows(key, start, stop)
        return self._product(key, stored, slice(start, stop)) if self._quantised(key) else stored

    def _spec_of(self, key: str) -> TensorSpec:
        spec = self._stored.spec(key)
        return TensorSpec(spec.shape, self._dtype) if self._quantised(key) else spec

    def _quantised(self, key: str) -> bool:
        return key in self._scales or self._stored.spec(key).dtype in FLOAT8

    def _product(self, key: str, stored: Tensor, rows: slice) -> Tensor:
        if key not in self._scales:
            return stored.to(self._dtype)
        scale = self._stored[self._scales[key]].float()
        if scale.numel() > 1:
            scale = scale.reshape(-1, *[1] * (stored.dim() - 1))[rows]
        return stored.float().mul_(scale.reshape(()) if scale.numel() == 1 else scale).to(self._dtype)

    def _check(self, key: str, scale: str) -> None:
        if key not in self._stored:
            raise DyditError(
                f"The scale '{scale}' belongs to no tensor of the file.",
                why=f"It scales '{key}', which is not there.",
                fix="Copy or download the file again.",
            )
        found, rows = self._stored.spec(scale), self._stored.spec(key).shape[0]
        by_row = found.shape[:1] == (rows,) and found.numel == rows
        if not (found.numel == 1 or by_row) or not found.dtype.is_floating_point:
            raise DyditError(
                f"The scale '{scale}' is of shape {found.shape} and type {str(found.dtype).removeprefix('torch.')}.",
                why=f"dydit reads one scale a tensor or one a row; '{key}' has {rows} rows.",
                fix="Bring the model's bf16 file.",
            )
