"""What several formats refuse, in the same words. Nothing here reads weights."""

from __future__ import annotations

from dydit_cli.dynamic.routers import WIDTHS
from dydit_cli.errors import DyditError
from dydit_cli.export.report import Source
from dydit_cli.export.skeleton import skeleton
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.plugged import provider_of
from dydit_cli.recipe.schema import ExportSection


def refuse_following_timestep(source: Source, settings: ExportSection) -> None:
    """For formats that hold one number for each weight.

    Raises:
        DyditError: If the model's weights follow the timestep (TD-LoRA).
    """
    if source.config.get("td_lora") is not None:
        raise DyditError(
            f"A model trained with TD-LoRA cannot be written in the {settings.format} format.",
            why="Its weights are others at each timestep, and that format has one of each.",
            fix="Pass --format diffusers, which ships the experts and the code that mixes them; or train with method lora, whose "
            "adapters are merged.",
        )


def refuse_plugin_width(source: Source, settings: ExportSection) -> None:
    """For formats that are read by code or in a layout which knows dydit's own routers alone.

    Raises:
        DyditError: If the width routers are those of a plug-in.
    """
    width = source.config.get("width", "free")
    # False: there are none.
    if not isinstance(width, str) or (width in WIDTHS and provider_of("width", width) is None):
        return
    raise DyditError(
        f"A model with routers of the kind '{width}' cannot be written in the {settings.format} format.",
        why="What reads that format knows dydit's own routers, and these come from a plug-in of yours.",
        fix="Pass --format static for the complete model; a DiT, SiT or Latte has --format baked as well, which needs no width routers.",
    )


def refuse_pipeline(source: Source, settings: ExportSection) -> None:
    """For families that are told classes.

    Raises:
        DyditError: If a pipeline's parts were asked for.
    """
    if settings.pipeline is not None:
        raise DyditError(
            f"A {source.family.title} takes no --pipeline.",
            why="Text encoders and tokenizers are parts of text-to-image models (FLUX); this family is told classes by number.",
            fix="Leave --pipeline out; --vae DIR brings an autoencoder.",
        )


def refuse_parts(settings: ExportSection) -> None:
    """For formats of the transformer alone.

    Raises:
        DyditError: If parts of a pipeline were asked for.
    """
    for option, value, what in (
        ("--vae", settings.vae, "autoencoder"),
        ("--pipeline", settings.pipeline, "pipeline"),
    ):
        if value:
            raise DyditError(
                f"The {settings.format} format takes no {what}.",
                why="It holds the transformer's weights alone.",
                fix=f"Leave {option} out, or export with --format diffusers.",
            )


def refuse_baked(source: Source) -> None:
    """For formats that need width routers.

    Raises:
        DyditError: If the model is an export whose widths were written down.
    """
    if source.config.get("baked") is not None:
        raise DyditError(
            "The widths of this model are baked already.",
            why="It is an export: its width routers are gone, and it serves the timesteps of one schedule.",
            fix="Export the model that it was made from; this folder itself can be copied, or written with --format static.",
        )


def refuse_budget(source: Source, settings: ExportSection) -> None:
    """For formats that run at a budget, where a model was trained for a range of them.

    Raises:
        DyditError: If it was not, or not for this one. What its budgets realise stands in the weights: loading them looks at that.
    """
    if settings.budget is None:
        return
    model = skeleton(source)
    if isinstance(model, DynamicTransformer) and model.budget_router is not None:
        model.budget_router.to_empty(device="cpu").forget_corrections()
    model.set_budget(settings.budget)


def refuse_measured(settings: ExportSection) -> None:
    """For formats whose model is another than the one that was measured.

    Raises:
        DyditError: If the card was to show measurements.
    """
    if settings.measured:
        raise DyditError(
            f"The {settings.format} format takes no --measured.",
            why="What was measured is the dynamic model, and this format holds a static one of other cost and other pictures.",
            fix="Leave --measured out, or export with --format diffusers.",
        )
