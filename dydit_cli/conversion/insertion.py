"""Put a source's weights, its routers and the order of its units into a dynamic model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dydit_cli.conversion.order import UnitOrder
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family, Source

OURS = ("_router.", ".head_order", ".channel_order")


def is_ours(key: str) -> bool:
    """Whether a key is a router's or an order's, which static files do not have."""
    return any(part in key for part in OURS)


def build_from(family: Family, source: Source, seed: int) -> DynamicModel:
    """Make the dynamic model of a source in fp32, with the source's weights and routers at the paper's start.

    Args:
        family: Of the source.
        source: What `Family.read` returned.
        seed: Of the routers' xavier weights.

    Raises:
        DyditError: If keys are missing, left over, or of the wrong shape.
    """
    # Router weights are the only draw here; forking keeps the caller's generator as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.build(source.config)
    tensors = {
        key: tensor if key.endswith("_order") else tensor.float() for key, tensor in source.tensors.items()
    }
    check_fit(family, model, tensors, source)
    model.load_state_dict(tensors, strict=False)
    return model.eval()


def check_fit(family: Family, model: DynamicModel, found: Mapping[str, Tensor], source: Source) -> None:
    """Compare keys and shapes with those of the model that the source's configuration makes.

    Raises:
        DyditError: With the first few of each kind of misfit.
    """
    expected = model.state_dict()
    missing = [key for key in expected if key not in found and (source.dynamic or not is_ours(key))]
    # A dynamic file of the authors has no orders: its units stand in the order of their rank.
    missing = [key for key in missing if not key.endswith("_order")]
    extra = [key for key in found if key not in expected]
    wrong = [
        f"{key} is {tuple(found[key].shape)}, not {tuple(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    if not (missing or extra or wrong):
        return
    parts = [
        f"{len(names)} {what} ({'; '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("not known", extra), ("of the wrong shape", wrong))
        if names
    ]
    raise DyditError(
        f"The checkpoint does not fit a {family.title} of {model.geometry.hidden_size} channels and "
        f"{model.geometry.depth} blocks.",
        why=f"Of its tensors, {', '.join(parts)}.",
        fix=f"Check --family and --num-heads; the layout expected is that of {family.reference_url}.",
    )


@torch.no_grad()
def set_order(model: DynamicModel, order: UnitOrder) -> None:
    """Write the order of units beside the layers; the weights stay where they are."""
    for block, heads, channels in zip(model.dynamic_blocks, order.heads, order.channels, strict=True):
        block.attn.head_order.copy_(heads)
        block.mlp.channel_order.copy_(channels)


def order_of(model: DynamicModel) -> UnitOrder:
    """Read the order that a model holds."""
    heads = torch.stack([block.attn.head_order for block in model.dynamic_blocks])
    channels = torch.stack([block.mlp.channel_order for block in model.dynamic_blocks])
    return UnitOrder(heads.clone(), channels.clone(), model.geometry.num_groups, "sorted")
