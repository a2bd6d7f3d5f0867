"""What a conversion and the fine-tuning after it will take, from a checkpoint's header alone: nothing is read but names and shapes.

The model is built as shapes on torch's meta device, so that every number comes from the class that will be trained: parameters from
its modules, MACs from its formula. Memory is what weights, gradients, optimiser and average must have; activations, which depend on
batch, resolution and checkpointing, are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dydit_cli.adapters.attaching import adaptable_layers
from dydit_cli.checkpoints import Checkpoint
from dydit_cli.checkpoints.lazy import lazily
from dydit_cli.conversion.convert import choose_family
from dydit_cli.conversion.insertion import check_fit, is_ours
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Hints
from dydit_cli.families.flux_geometry import FluxGeometry
from dydit_cli.flops import macs_of, ratio_floor

WEIGHT = GRADIENT = AVERAGE = 4
MOMENTS = 8
TRAINED = WEIGHT + GRADIENT + MOMENTS + AVERAGE
"""Bytes a parameter that trains: fp32 weight and gradient, AdamW's two moments, the moving average."""

DEFAULT_RATIO = 0.5

ADAPTER_RANK, ADAPTER_EXPERTS = 4, 4
"""Of TD-LoRA as `dydit finetune` attaches it unless told otherwise."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass of one image, in billions (10^9).

    Attributes:
        static: Of the static model, LayerNorm included.
        routed: Attention and MLPs, which are what a ratio refers to.
        routers: What routers add.
        dynamic: At the target ratio, routers included; LayerNorms as in the static model.
        ratio: The target.
        ratio_floor: The least target that training can be given.
    """

    static: float
    routed: float
    routers: float
    dynamic: float
    ratio: float
    ratio_floor: float


@dataclass(frozen=True)
class Bytes:
    """Sizes in bytes.

    Attributes:
        source: Of the checkpoint's tensors as the model gets them (fp8 files as bf16).
        converted: Of the artifact that `dydit convert` writes.
        convert_memory: What conversion needs at most beside the libraries: two fp32 copies of the largest tensor, and the routers.
        train_full: Fine-tuning of all parameters, without activations.
        train_adapter: TD-LoRA and routers over a frozen base in the source's types, without activations.
        caption: One cached caption in fp32, which is how `dydit prepare` stores them unless told otherwise; 0 without captions.
        sample: One cached image: the autoencoder's mean and variance in fp32.
    """

    source: int
    converted: int
    convert_memory: int
    train_full: int
    train_adapter: int
    caption: int
    sample: int


@dataclass(frozen=True)
class Price:
    """What converting and training a checkpoint takes.

    Attributes:
        family: Its name.
        path: The checkpoint.
        quantisation: ``fp8`` or ``scaled fp8``, or "".
        dynamic: Whether the file has the authors' routers already.
        geometry: Numbers of the model; tokens and text at its reference resolution.
        config: Of the model class.
        params: ``static``, ``routers``, ``total`` and ``adapter`` (of TD-LoRA).
        gmacs: Costs of a forward pass.
        bytes: Sizes.
    """

    family: str
    path: str
    quantisation: str
    dynamic: bool
    geometry: dict[str, Any]
    config: dict[str, Any]
    params: dict[str, int]
    gmacs: Macs
    bytes: Bytes

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def price(
    checkpoint: Checkpoint,
    *,
    family: str = "auto",
    hints: Hints | None = None,
    ratio: float | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Price:
    """Price a checkpoint that `open_checkpoint` opened.

    Args:
        checkpoint: Its tensors are not read.
        family: Name of its family, or ``auto`` where the file alone decides.
        hints: What the file cannot say.
        ratio: λ, the target of fine-tuning; by default 0.5, or the least possible where that is more.
        sizes: ``sample_size`` and ``text_tokens`` that it is priced at, where no tensor tells them.

    Raises:
        DyditError: If the file is of no known family or does not fit it, or the ratio cannot be reached.
    """
    if ratio is not None and not 0 < ratio <= 1:
        raise DyditError(
            f"A target ratio of {ratio:g} is not possible.",
            why="It is the share of the static model's attention and MLPs that is executed, above 0 and at most 1.",
            fix="Pass --target-ratio 0.5, for instance.",
        )
    chosen = choose_family(checkpoint, family)
    given = hints or Hints()
    source = chosen.read(checkpoint.tensors, replace(given, config=given.config or checkpoint.config))
    source = replace(source, config={**source.config, **(sizes or {})})
    all_specs = lazily(source.tensors).specs
    with torch.device("meta"):
        model = chosen.model_class(**source.config)
        check_fit(chosen, model, {key: torch.empty(spec.shape) for key, spec in all_specs.items()}, source)
    floor = ratio_floor(model.geometry)
    if ratio is not None and ratio < floor:
        raise DyditError(
            f"A target ratio of {ratio:g} cannot be reached.",
            why=f"What is always on takes {floor:.3f} of this model's attention and MLPs.",
            fix=f"Pass --target-ratio {math.ceil(floor * 1000) / 1000:g} or more.",
        )
    gmacs = _macs(model.geometry, ratio or max(DEFAULT_RATIO, floor))
    specs = {key: spec for key, spec in all_specs.items() if not is_ours(key)}
    routers = sum(parameter.numel() for parameter in model.router_parameters())
    orders = sum(buffer.nbytes for name, buffer in model.named_buffers() if is_ours(name))
    static = sum(spec.numel for spec in specs.values())
    params = {
        "static": static,
        "routers": routers,
        "total": static + routers,
        "adapter": _adapter_parameters(model),
    }
    stored = sum(spec.nbytes for spec in specs.values())
    router_bytes = WEIGHT * routers
    return Price(
        family=chosen.name,
        path=str(checkpoint.path),
        quantisation=checkpoint.quantisation,
        dynamic=source.dynamic,
        geometry=asdict(model.geometry),
        config=dict(source.config),
        params=params,
        gmacs=gmacs,
        bytes=Bytes(
            source=stored,
            converted=stored + router_bytes + orders,
            convert_memory=2 * WEIGHT * max(spec.numel for spec in specs.values()) + router_bytes,
            train_full=TRAINED * params["total"],
            train_adapter=stored + TRAINED * (params["adapter"] + routers),
            caption=_caption_bytes(model.geometry),
            sample=_sample_bytes(model.geometry),
        ),
    )


def _adapter_parameters(model: DynamicModel) -> int:
    """Of TD-LoRA: a shared A, one B an expert, and a gate on the timestep embedding, in every layer that can have one."""
    gate = (model.geometry.hidden_size + 1) * ADAPTER_EXPERTS
    shapes = [model.get_submodule(name).weight.shape for name in adaptable_layers(model)]
    return sum(ADAPTER_RANK * (columns + ADAPTER_EXPERTS * rows) + gate for rows, columns in shapes)


def _caption_bytes(geometry: Geometry) -> int:
    if not isinstance(geometry, FluxGeometry):
        return 0
    return WEIGHT * (geometry.text_tokens * geometry.joint_size + geometry.pooled_size)


def _sample_bytes(geometry: Geometry) -> int:
    return 2 * WEIGHT * math.prod(geometry.sample_shape)


def _macs(geometry: Geometry, ratio: float) -> Macs:
    static = macs_of(geometry)
    routers = sum(geometry.block_router_macs())
    dynamic = static.total - (1 - ratio) * static.routed + routers
    return Macs(
        static=static.total / 1e9,
        routed=static.routed / 1e9,
        routers=routers / 1e9,
        dynamic=dynamic / 1e9,
        ratio=ratio,
        ratio_floor=ratio_floor(geometry),
    )
