"""`dydit finetune --dry-run`: everything up to the first step, shown instead of trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dydit_cli.cli import console
from dydit_cli.cli.progress import progress_bar
from dydit_cli.shell import quoted

if TYPE_CHECKING:
    from rich.table import Table

    from dydit_cli.recipe.loading import Recipe
    from dydit_cli.recipe.schema import FinetuneSection


def show(section: FinetuneSection, recipe: Recipe, as_json: bool) -> None:
    """Check and open everything a run needs, print its recipe, and draw its next batch beside the run's folder.

    The picture is all that is written: ``OUT.dry-run.png``.
    """
    from dydit_cli.training.batch_picture import write_batch_picture
    from dydit_cli.training.rehearsal import rehearse

    with progress_bar() as progress:
        progress.add_task("opening model and data", total=None)
        rehearsal = rehearse(section, recipe=recipe)
    out = Path(section.out)
    picture = write_batch_picture(out.with_name(f"{out.name}.dry-run.png"), rehearsal)
    for warning in rehearsal.warnings:
        console.warn(warning)
    if as_json:
        console.emit_json(
            {
                "finetune": section.model_dump(mode="json"),
                **rehearsal.facts,
                "captions": rehearsal.captions,
                "picture": picture,
            }
        )
        return
    console.say(rehearsal.recipe_yaml.rstrip())
    console.say("")
    console.results().print(_table(rehearsal.facts, section))
    console.say(f"One batch as training sees it: {picture}")
    console.note("Nothing was trained, and nothing else was written.")
    name = str(recipe.source) if recipe.source is not None else ""
    price = f"dydit plan {quoted(name)}" if name else "dydit plan RECIPE"
    console.note(f"next: {price} says what the run takes; leave --dry-run out to start it")


def _table(facts: dict[str, Any], section: FinetuneSection) -> Table:
    from rich.table import Table

    shape = " x ".join(str(side) for side in facts["sample_shape"])
    share = facts["trained_parameters"] / facts["parameters"]
    rows = [
        (
            "model",
            f"{facts['family']}, {facts['parameters']:,} parameters, of which {facts['trained_parameters']:,} train ({share:.2%})",
        ),
        (
            "data",
            f"{facts['data']}: {facts['training_samples']:,} samples of {shape}, {facts['held_out_samples']:,} held out",
        ),
        (
            "length",
            f"{facts['steps_left']:,} steps of {section.batch_size}, {facts['epochs']:.3g} times through the data in all",
        ),
        ("writes", str(section.out)),
    ]
    grid = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        grid.add_row(*row)
    return grid
