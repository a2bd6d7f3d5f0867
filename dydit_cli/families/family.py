"""What the rest of the package needs to know of a model family: a value, not a class tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel

ObjectiveKind = Literal["diffusion", "flow", "rectified-flow"]


@dataclass(frozen=True)
class Hints:
    """What a checkpoint's file cannot say and its user may.

    Attributes:
        num_heads: Attention heads, where the width is not a published one.
        num_groups: Channel groups of the MLP; None means as many as heads.
        axes_dims_rope: How a head's channels are shared among FLUX's rotary axes, where heads are not of 128 channels.
        config: The ``config.json`` beside the weights, where there is one; families that can do without it ignore it.
    """

    num_heads: int | None = None
    num_groups: int | None = None
    axes_dims_rope: tuple[int, ...] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A checkpoint read as a family's: the model's configuration, and its tensors under our keys.

    Attributes:
        config: Keyword arguments of the model class.
        tensors: State dict without what is missing from a static file (routers, orders); it may be read as it is used.
        dynamic: Whether the file has routers already.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    dynamic: bool


@dataclass(frozen=True)
class Family:
    """One family of diffusion transformers.

    Attributes:
        name: As given to ``--family``.
        title: For people.
        reference_url: The original implementation.
        objective: ``diffusion`` (noise prediction), ``flow`` (velocity, data at t = 1) or ``rectified-flow`` (velocity, data at t = 0).
        model_class: The dynamic model.
        pipeline_class: The same model in the convention of diffusers' pipelines.
        presets: Size name -> configuration of the model class.
        recognises: Whether a state dict could be of this family.
        read: Turn a state dict in the original layout into a `Source`.
        write: Turn a model's state dict into the original layout, routers as the authors name them.
        stock_pipeline: Name of diffusers' pipeline that runs the exported model; None where there is none.
        layout: Name of the layout that a source's keys are in, where a family is read from several.
        missing: Commands and options that do not take the family -> what to do instead.
    """

    name: str
    title: str
    reference_url: str
    objective: ObjectiveKind
    model_class: type[DynamicModel]
    pipeline_class: type[DynamicModel]
    presets: Mapping[str, Mapping[str, Any]]
    recognises: Callable[[Mapping[str, Tensor]], bool]
    read: Callable[[Mapping[str, Tensor], Hints], Source]
    write: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    stock_pipeline: str | None = "DiTPipeline"
    layout: Callable[[Iterable[str]], str] = lambda keys: "original"
    missing: Mapping[str, str] = field(default_factory=dict)

    def build(self, config: Mapping[str, Any]) -> DynamicModel:
        """Make a model with unset weights of a configuration, routers at the paper's start."""
        model = self.model_class(**config)
        reset_routers(model)
        return model


def require(family: Family, name: str) -> None:
    """See that a command or an option takes a family.

    Raises:
        DyditError: If it does not, with what to do instead.
    """
    if name in family.missing:
        raise DyditError(
            f"`{name}` does not take a {family.title}.",
            why="For this family dydit reads, converts and profiles, and gives the model to diffusers' own pipeline.",
            fix=family.missing[name],
        )


def reset_routers(model: DynamicModel) -> None:
    """Give every router the paper's start: xavier weights, biases at which everything is on."""
    with torch.no_grad():
        for block in model.dynamic_blocks:
            block.reset_routers()
