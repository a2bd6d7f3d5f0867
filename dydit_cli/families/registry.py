"""The families, in one tuple. To add one, write a file beside this and name it here (CONTRIBUTING.md tells the steps)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.families import dit_files, latte_t2v_files, original_dit, original_flux, original_latte
from dydit_cli.families.dit import DyDiTTransformer2DModel
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import Family
from dydit_cli.families.flux import DyFluxTransformer2DModel
from dydit_cli.families.latte import DyLatteTransformer3DModel
from dydit_cli.families.latte_t2v import DyLatteT2VTransformer3DModel
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


# Classes of the data sets that Latte was published for; the last three are unconditional.
VIDEO_SETS = {"ucf101": 101, "ffs": 0, "sky": 0, "taichi": 0}


def published_videos() -> Mapping[str, Mapping[str, Any]]:
    """Latte's sizes for 16 frames at 256 pixels: with UCF101's classes, ``...-unconditional``, and XL/2 by its data sets."""
    sizes = {
        name: {**config, "num_frames": 16}
        for name, config in published_sizes(learn_sigma=True).items()
        if not name.endswith("-512")
    }
    classes = {"": VIDEO_SETS["ucf101"], "-unconditional": 0}
    presets = {
        name + suffix: {**config, "num_classes": count}
        for name, config in sizes.items()
        for suffix, count in classes.items()
    }
    return presets | {
        f"xl/2-{name}": {**sizes["xl/2"], "num_classes": count} for name, count in VIDEO_SETS.items()
    }


DIT = Family(
    name="dit",
    title="DiT",
    reference_url="https://github.com/facebookresearch/DiT",
    objective="diffusion",
    model_class=DyDiTTransformer2DModel,
    pipeline_class=DyDiTTransformer2DModel,
    presets=published_sizes(learn_sigma=True),
    recognises=dit_files.recognises,
    read=dit_files.read,
    write=original_dit.write,
    layout=dit_files.layout_of,
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

LATTE = Family(
    name="latte",
    title="Latte",
    reference_url="https://github.com/Vchitect/Latte",
    objective="diffusion",
    model_class=DyLatteTransformer3DModel,
    pipeline_class=DyLatteTransformer3DModel,
    presets=published_videos(),
    recognises=original_latte.recognises,
    read=original_latte.read,
    write=original_latte.write,
    # diffusers' LattePipeline drives the text-to-video form alone.
    stock_pipeline=None,
)

IN_A_PIPELINE = "Pass dydit_cli.load_model(FOLDER) as the transformer of diffusers' LattePipeline; docs/latte_t2v.md shows how."

LATTE_T2V = Family(
    name="latte-t2v",
    title="text-to-video Latte",
    reference_url="https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/transformers/latte_transformer_3d.py",
    objective="diffusion",
    model_class=DyLatteT2VTransformer3DModel,
    pipeline_class=DyLatteT2VTransformer3DModel,
    # Latte-1: 16 frames of 512 pixels.
    presets={
        "1": {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "num_layers": 28,
            "sample_size": 64,
            "video_length": 16,
            "caption_channels": 4096,
        }
    },
    recognises=latte_t2v_files.recognises,
    read=latte_t2v_files.read,
    write=latte_t2v_files.write,
    missing={
        "dydit finetune": "Train it with a loop of your own (model.denoise gives the prediction and the masks), or fine-tune a "
        "class-conditional Latte.",
        "dydit sample": IN_A_PIPELINE,
        "dydit export": f"Pass --format torch-export. Without an export: {IN_A_PIPELINE[0].lower()}{IN_A_PIPELINE[1:]}",
        "dydit bench": "Measure it with `dydit profile --latency`.",
        "--importance taylor": "Pass --importance magnitude, which needs no data.",
        "--calibrate": "Leave it out: dydit reads no videos with captions, on which it could measure.",
        "--data": "Leave it out; MACs, widths and times need no data.",
    },
)

# Blocks of two streams, blocks of one, whether a guidance scale is embedded. Krea, Kontext and Fill are built like dev.
FLUX_SIZES = {"dev": (19, 38, True), "schnell": (19, 38, False), "lite": (8, 38, True), "mini": (5, 10, True)}

FLUX = Family(
    name="flux",
    title="FLUX",
    reference_url="https://github.com/black-forest-labs/flux",
    objective="rectified-flow",
    model_class=DyFluxTransformer2DModel,
    pipeline_class=DyFluxTransformer2DModel,
    presets={
        size: {"num_layers": double, "num_single_layers": single, "guidance_embeds": guidance}
        for size, (double, single, guidance) in FLUX_SIZES.items()
    },
    recognises=original_flux.recognises,
    read=original_flux.read,
    write=original_flux.write,
    stock_pipeline="FluxPipeline",
    layout=original_flux.layout_of,
)

FAMILIES: tuple[Family, ...] = (DIT, SIT, LATTE, LATTE_T2V, FLUX)


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
