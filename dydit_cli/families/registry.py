"""The families, in one tuple. To add one, write a file beside this and name it here (CONTRIBUTING.md tells the steps)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.families import original_dit
from dydit_cli.families.dit import DyDiTTransformer2DModel
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family
from dydit_cli.families.sit import DySiTPipelineTransformer2DModel, DySiTTransformer2DModel

SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}


def published_sizes(learn_sigma: bool) -> Mapping[str, Mapping[str, Any]]:
    """Configurations of S, B, L and XL with patches of 2, 4 and 8 at 256 pixels (32x32 latents), and ``...-512`` at 512."""
    return {
        f"{size}/{patch}{suffix}": {
            "sample_size": side,
            "patch_size": patch,
            "in_channels": 4,
            "hidden_size": hidden,
            "num_layers": depth,
            "num_attention_heads": heads,
            "num_classes": 1000,
            "learn_sigma": learn_sigma,
        }
        for size, (hidden, depth, heads) in SIZES.items()
        for patch in (2, 4, 8)
        for suffix, side in (("", 32), ("-512", 64))
    }


DIT = Family(
    name="dit",
    title="DiT",
    reference_url="https://github.com/facebookresearch/DiT",
    objective="diffusion",
    model_class=DyDiTTransformer2DModel,
    pipeline_class=DyDiTTransformer2DModel,
    presets=published_sizes(learn_sigma=True),
    recognises=original_dit.recognises,
    read=original_dit.read,
    write=original_dit.write,
)

SIT = Family(
    name="sit",
    title="SiT",
    reference_url="https://github.com/willisma/SiT",
    objective="flow",
    model_class=DySiTTransformer2DModel,
    pipeline_class=DySiTPipelineTransformer2DModel,
    presets=published_sizes(learn_sigma=True),
    # The authors released a dynamic DiT and no dynamic SiT.
    recognises=lambda tensors: (
        original_dit.recognises(tensors) and not original_dit.has_authors_routers(tensors)
    ),
    read=original_dit.read,
    write=original_dit.write,
)

FAMILIES: tuple[Family, ...] = (DIT, SIT)


def family_named(name: str) -> Family:
    """Return the family called ``name``.

    Raises:
        DyditError: If there is none, with the nearest name.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    known = [family.name for family in FAMILIES]
    raise DyditError(
        f"There is no model family called '{name}'.",
        why=f"The families are {', '.join(known)}.",
        fix=did_you_mean(name, known) or "Pass one of these.",
    )


def family_of(model: DynamicModel) -> Family:
    """Return the family of a model."""
    return family_named(model.family)


def class_named(name: str) -> type[DynamicModel] | None:
    """Return the model class with the name that a ``config.json`` records, or None."""
    classes = {
        cls.__name__: cls for family in FAMILIES for cls in (family.model_class, family.pipeline_class)
    }
    return classes.get(name)


def preset_named(name: str) -> tuple[Family, dict[str, Any]]:
    """Return the family and configuration of a preset such as ``dit-xl/2``.

    Raises:
        DyditError: If there is none, with the nearest name.
    """
    presets = {
        f"{family.name}-{size}": (family, dict(config))
        for family in FAMILIES
        for size, config in family.presets.items()
    }
    if name.lower() in presets:
        return presets[name.lower()]
    raise DyditError(
        f"There is no preset called '{name}'.",
        why=f"The presets are {', '.join(presets)}.",
        fix=did_you_mean(name.lower(), presets) or "Pass one of these.",
    )
