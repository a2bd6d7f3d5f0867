"""`dydit plan RECIPE`: what the fine-tuning of a recipe trains, needs and takes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dydit_cli.cli import console
from dydit_cli.cli.plan import size
from dydit_cli.cli.progress import progress_bar
from dydit_cli.errors import DyditError
from dydit_cli.shell import quoted

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from dydit_cli.conversion.outlook import Outlook
    from dydit_cli.data import DataSplit
    from dydit_cli.families.family import Family
    from dydit_cli.recipe.loading import Recipe
    from dydit_cli.recipe.schema import FinetuneSection
    from dydit_cli.training.pace import Pace
    from dydit_cli.training.planning import RunPlan

FULL = 0.9
"""Of what is free; beyond it a user is warned."""


def plan_recipe(
    name: str,
    overrides: Sequence[str],
    options: Mapping[str, object],
    *,
    preset: str | None,
    measure: bool,
    as_json: bool,
) -> None:
    """Price the fine-tuning of a recipe and print it."""
    from dydit_cli.devices import find_device
    from dydit_cli.recipe.loading import load_recipe
    from dydit_cli.recipe.schema import FinetuneSection
    from dydit_cli.training.pace import pace_of
    from dydit_cli.training.planning import plan_run

    given = {key: value for key, value in options.items() if value is not None}
    recipe = load_recipe(name, overrides, "finetune", given)
    section = recipe.get(FinetuneSection)
    if section is None:
        raise TypeError("load_recipe completes the section that it is asked for")
    device = find_device(section.device)
    model = _model(section, recipe, preset)
    with progress_bar() as progress:
        task = progress.add_task("counting", total=None)
        plan = plan_run(section, model.family, model.config)
        data, missing = _data(section, model.family, model.config)
        progress.update(task, description="making a few steps" if measure else "estimating")
        pace = pace_of(section, plan, model.family, model.config, data, device, measure=measure)
    warnings = _warnings(section, plan, pace, device, missing)
    if as_json:
        facts = {"recipe": recipe.name, "model": {"known_from": model.source, "assumed": model.assumed}}
        console.emit_json({**facts, **plan.as_json(), "pace": pace.as_json(), "warnings": warnings})
        return
    console.results().print(table(section, plan, pace, model))
    for warning in warnings:
        console.warn(warning)
    words = " ".join(quoted(word) for word in (name, *overrides))
    if not Path(section.model).exists():
        console.note(f"next: dydit convert {words}")
    else:
        console.note(f"next: dydit finetune {words} --dry-run")


def table(section: FinetuneSection, plan: RunPlan, pace: Pace, model: Outlook) -> Table:
    """The figures, one a line."""
    from rich.table import Table

    parameters, memory, disk = plan.parameters, plan.memory, plan.disk
    parts = section.processes * section.accumulate
    batch = f"{section.batch_size}" + (f" in {parts} parts" if parts > 1 else "")
    rows = [
        (
            "model",
            f"{plan.family}, {plan.geometry['depth']} blocks of {plan.geometry['hidden_size']} channels, from {model.source}",
        ),
        ("parameters", f"{parameters.static:,} + {parameters.routers:,} of routers"),
        ("trains", f"{parameters.trained:,}, {parameters.share:.2%} of the static model's"),
        (
            "memory" + (" of each process" if section.processes > 1 else ""),
            f"{size(memory.total)}: weights {size(memory.weights)}, gradients {size(memory.gradients)}, moments "
            f"{size(memory.moments)}, average {size(memory.average)}"
            + (f", teacher {size(memory.teacher)}" if memory.teacher else "")
            + f", activations {size(memory.activations)} (batch of {batch}, {section.mixed_precision} mixed precision"
            + (", recomputed)" if section.gradient_checkpointing else ")"),
        ),
        (
            "disk",
            f"{size(disk.total)}: {disk.kept} checkpoints of {size(disk.checkpoint)}, and {size(disk.artifact)} of weights",
        ),
        ("a step", f"{duration(pace.step_s)}, {_how(pace)}"),
    ]
    if plan.work.complete_steps:
        rows.append(
            (
                "with the complete branch",
                f"{duration(pace.complete_step_s)}, in {plan.work.complete_steps:,} of the steps",
            )
        )
    rows.append(
        (
            "the run",
            f"{duration(pace.total_s)} for {section.steps:,} steps and what they evaluate, on {pace.device}"
            + ("" if pace.how == "measured" else f" ({pace.how})"),
        )
    )
    grid = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        grid.add_row(*row)
    return grid


def duration(seconds: float) -> str:
    """Seconds in words: 0.21 s, 3.4 min, 5.2 h, 12 days."""
    for unit, scale in (("days", 172_800.0), ("h", 3_600.0), ("min", 60.0)):
        if seconds >= (scale if unit != "min" else 120):
            count = seconds / (86_400.0 if unit == "days" else scale)
            return f"{count:,.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"
    return f"{seconds:.3g} s"


def _how(pace: Pace) -> str:
    samples = "read from the data" if pace.data else "of noise"
    if pace.how == "measured":
        return f"measured on two steps of {pace.batch} samples {samples}"
    if pace.how == "extrapolated":
        return f"extrapolated: {pace.why} ({samples})"
    return (
        f"estimated from its multiply-accumulates and the speed of a matrix product, not measured: {pace.why}"
    )


def _model(section: FinetuneSection, recipe: Recipe, preset: str | None) -> Outlook:
    """The model of a run: the folder's, or the one that the recipe's conversion will make.

    Raises:
        DyditError: If neither is known, or dydit does not train its family.
    """
    from dydit_cli.artifacts import model_config
    from dydit_cli.conversion.outlook import Outlook, outlook
    from dydit_cli.families.family import require
    from dydit_cli.families.registry import class_named, family_named
    from dydit_cli.recipe.schema import ConvertSection

    if preset is None and Path(section.model).expanduser().exists():
        config = model_config(section.model)
        found = class_named(str(config["_class_name"]))
        if found is None:
            raise TypeError(config["_class_name"])
        model = Outlook(family_named(found.family), config, section.model)
    else:
        convert = recipe.get(ConvertSection)
        model = outlook(convert, recipe.name, preset)
    require(model.family, "dydit finetune")
    return model


def _data(
    section: FinetuneSection, family: Family, config: Mapping[str, Any]
) -> tuple[DataSplit | None, str]:
    """The data of a run; or none, and why."""
    import torch

    from dydit_cli.data import open_data
    from dydit_cli.training.planning import trained_model

    with torch.device("meta"):
        geometry = trained_model(section, family, config).geometry
    try:
        return open_data(section.data, geometry=geometry), ""
    except DyditError as error:
        return None, error.what


def _warnings(
    section: FinetuneSection, plan: RunPlan, pace: Pace, device: torch.device, missing: str
) -> list[str]:
    from dydit_cli.training.pace import free_memory

    warnings = []
    if missing:
        used = "" if pace.how == "estimated" else " Noise took their place."
        warnings.append(f"The data are not here: {missing}{used}")
    memory = free_memory(device)
    if memory is not None and plan.memory.total > FULL * memory:
        warnings.append(
            f"The run needs {size(plan.memory.total)} of memory and {size(memory)} are free on {pace.device}: "
            "use gradient_checkpointing, accumulate, mixed_precision bf16, or a smaller batch_size."
        )
    parent = next(
        folder
        for folder in (Path(section.out).absolute(), *Path(section.out).absolute().parents)
        if folder.exists()
    )
    free = shutil.disk_usage(parent).free
    if plan.disk.total > FULL * free:
        warnings.append(
            f"The run writes up to {size(plan.disk.total)} and {size(free)} are free in {parent}: lower keep_checkpoints, or "
            "choose another out."
        )
    return warnings
