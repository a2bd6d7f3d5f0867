"""Where a user stands after a command: whether the model is cheaper at all, and the command that goes on, ready to paste."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dydit_cli.cli import console
from dydit_cli.shell import quoted

if TYPE_CHECKING:
    from dydit_cli.recipe.loading import Recipe

HARDLY_CHEAPER = 0.97
"""Above this share of the static model's attention and MLP MACs a model is not worth what its routers cost."""

UNTRAINED = 0.9999
"""Routers that keep more than this have learned nothing yet: every one starts with everything on."""

RECIPE = "recipe.yaml"


def warn_if_hardly_cheaper(ratio: float | None, model: str | Path | None, execution: str = "compact") -> None:
    """Warn where a model that decides for itself does nearly all of the static model's work.

    Args:
        ratio: Realised share of attention and MLP MACs, if it is known.
        model: Its folder.
        execution: How it ran; static execution is complete on purpose.
    """
    if ratio is None or ratio <= HARDLY_CHEAPER or execution == "static":
        return
    if ratio > UNTRAINED:
        console.warn(
            "the model keeps everything: its routers were not trained, so that it is no cheaper than the static one."
        )
        if model is not None:
            console.note(
                f"  fix: dydit finetune --model {quoted(model)} --data DATA --steps 50000 --out {beside(model, 'finetuned')}"
            )
        return
    console.warn(
        f"the model still does {ratio:.1%} of the static model's attention and MLP work: it is hardly cheaper. Fine-tune it longer, or "
        "to a lower target_ratio."
    )


def next_stage(recipe: Recipe | None, out: str | Path, stages: Sequence[str]) -> str | None:
    """The command for the first of the stages that the recipe of a run is complete for, from the copy in its folder.

    Args:
        recipe: Of the run.
        out: Its folder, which holds the resolved recipe.
        stages: What may come next, the nearest first.
    """
    if recipe is None or recipe.source is None:
        return None
    copy = Path(out) / RECIPE
    stage = next((stage for stage in stages if stage in recipe.sections), None)
    return f"dydit {stage} {quoted(copy)}" if stage is not None and copy.exists() else None


def beside(folder: str | Path, name: str) -> str:
    """A folder beside another one, as the shell takes it."""
    return quoted(Path(folder).parent / name)
