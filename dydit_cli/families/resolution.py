"""The geometry of the samples at hand, for families that take any resolution and any length of text."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Size

from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.families.text_condition import Condition, TextCondition


@runtime_checkable
class ResizableGeometry(Protocol):
    """A geometry that can be asked for at another resolution."""

    def at(self, height: int, width: int, text_tokens: int) -> Geometry:
        """The same model on latents of ``height`` x ``width`` and texts of ``text_tokens`` tokens."""
        ...


def geometry_of(geometry: Geometry, shape: Size, condition: Condition) -> Geometry:
    """The geometry of samples of a shape (..., h, w) with their conditions: costs and masks go by it."""
    if isinstance(geometry, ResizableGeometry) and isinstance(condition, TextCondition):
        return geometry.at(shape[-2], shape[-1], condition.prompt_embeds.shape[1])
    return geometry
