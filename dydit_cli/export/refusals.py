"""What several formats refuse, in the same words."""

from __future__ import annotations

from dydit_cli.errors import DyditError
from dydit_cli.export.report import Source
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
