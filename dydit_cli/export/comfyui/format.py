"""`dydit export --format comfyui`: a FLUX's weights with routers for ComfyUI's own loader, and the node that runs them."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

from dydit_cli.checkpoints.layout import Rearranged
from dydit_cli.export.comfyui.card import comfyui_card
from dydit_cli.export.comfyui.layout import comfyui_layout
from dydit_cli.export.comfyui.verify import node_difference
from dydit_cli.export.flux import open_flux, without_identity_orders
from dydit_cli.export.format import Format
from dydit_cli.export.refusals import (
    refuse_budget,
    refuse_following_timestep,
    refuse_parts,
    refuse_plugin_width,
)
from dydit_cli.export.report import ExportReport, Progress, Source, report_of, subject_of
from dydit_cli.export.skeleton import arguments_of
from dydit_cli.export.tensors import Cast, commonest_dtype, write_compared
from dydit_cli.families.flux import DyFluxTransformer2DModel
from dydit_cli.recipe.schema import ExportSection

NODE = "ComfyUI-dydit"
"""The folder's name; it goes into ComfyUI's ``custom_nodes``."""
SUFFIXES = (".py", ".md")
LOADER = {"head_dim": 128, "axes": (16, 56, 56), "latent_channels": 16, "mlp_ratio": 4}
"""What ComfyUI's loader takes every FLUX.1 to be: no tensor tells the axes, and it does not look at the others."""


def check_comfyui(source: Source, settings: ExportSection) -> None:
    """Refuse what the node does not run.

    Raises:
        DyditError: For everything that can be known without the weights.
    """
    refuse_following_timestep(source, settings)
    refuse_parts(settings)
    refuse_plugin_width(source, settings)
    refuse_budget(source, settings)


def write_comfyui(source: Source, settings: ExportSection, folder: Path, say: Progress) -> ExportReport:
    """Write the weights and the node, and verify both.

    Raises:
        DyditError: For everything that a user can put right.
    """
    ordered = source.config.get("width", "free") == "ordered"
    model, tensors = open_flux(source, say)
    kept = without_identity_orders(tensors)
    renamed = Rearranged(kept, comfyui_layout(kept.specs, ordered=ordered))
    written = Cast(renamed, {"*": settings.dtype} if settings.dtype else {})
    dtype = commonest_dtype(written)
    subject = subject_of(source, settings, model.geometry, dtype)
    file = folder / f"{subject.name}.safetensors"
    say(f"writing and comparing {file.name}")
    write_compared(folder, written, stem=file.stem, max_shard_size=None)
    copy_node(folder / NODE)
    say("verifying the node against the model")
    as_stored = Cast(tensors, {"*": settings.dtype} if settings.dtype else {})
    difference, scale, whole = node_difference(arguments_of(source), as_stored, folder / NODE, file)
    axes = model.config.axes_dims_rope
    card = comfyui_card(subject, file.name, NODE, axes=axes, ordered=ordered)
    (folder / "README.md").write_text(card, encoding="utf-8")
    notes = [
        "The node was run with the written weights, in torch and not in ComfyUI: that part of it is tested against a stand-in only."
    ]
    if not whole:
        notes.append(
            "All weights were compared with the model's; its blocks were run with one of either kind, because the whole model is large."
        )
    if (beyond := not_loadable(model)) is not None:
        notes.append(
            f"ComfyUI's own loader will not load this model: {beyond}. It takes every FLUX.1 to be of the published form."
        )
    return report_of(
        source,
        settings,
        dtype,
        difference,
        needs_vae=False,
        notes=notes,
        verified="Read back, every tensor is bit for bit what was meant; the outputs of the written node's blocks, of up to "
        f"{scale:.2g}, differ from the model's by at most {difference:.1e}.",
        facts={"weights for": "ComfyUI/models/diffusion_models", "node for": "ComfyUI/custom_nodes"},
    )


def copy_node(folder: Path) -> None:
    """Copy the custom node's files into a new folder."""
    folder.mkdir()
    with resources.as_file(resources.files("dydit_cli.export.comfyui") / "node") as node:
        for path in sorted(node.iterdir()):
            if path.suffix in SUFFIXES:
                shutil.copyfile(path, folder / path.name)


def not_loadable(model: DyFluxTransformer2DModel) -> str | None:
    """Why ComfyUI's loader, which infers widths and depths alone, would build another model than this; None if it would not."""
    geometry, config = model.geometry, model.config
    found = {
        "head_dim": config.attention_head_dim,
        "axes": tuple(config.axes_dims_rope),
        "latent_channels": geometry.in_channels,
        "mlp_ratio": geometry.mlp_hidden / geometry.hidden_size,
    }
    words = {
        "head_dim": "its heads have {} channels and not 128",
        "axes": "its rotary axes are {} and not 16, 56, 56",
        "latent_channels": "its latents have {} channels and not 16",
        "mlp_ratio": "its MLPs are {:g} times as wide as the model and not 4",
    }
    wrong = [
        words[name].format(", ".join(map(str, value)) if isinstance(value, tuple) else value)
        for name, value in found.items()
        if value != LOADER[name]
    ]
    return ", ".join(wrong) or None


COMFYUI = Format(
    name="comfyui",
    summary="weights for ComfyUI's own loader, and a node that runs them dynamically",
    families=("flux",),
    check=check_comfyui,
    write=write_comfyui,
    instead="Pass --format diffusers: ComfyUI loads FLUX from a single file, and has no DiT, SiT or Latte of this form.",
)
