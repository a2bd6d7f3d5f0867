"""`dydit demo`: the whole chain on a shipped model, with its honest control, and a table of what came out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dydit_cli.cli import completing, console, options
from dydit_cli.cli.stage import AnySection, Request
from dydit_cli.cli.standing import warn_if_hardly_cheaper
from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.shell import quoted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from dydit_cli.profiling.profile import ProfileReport
    from dydit_cli.recipe.loading import Recipe

EXAMPLES = (
    "dydit demo",
    "dydit demo --family sit --out runs/demo-sit",
    "dydit demo --family latte",
    "dydit demo --family flux",
    "dydit demo --steps 20",
)

FAMILIES = ("dit", "sit", "latte", "flux")
SUMMARY = "summary.json"
REPORT_SAMPLES = 10
"""Of each model, on the page."""


def demo(
    family: Annotated[
        str,
        typer.Option(
            help="Which shipped model: dit, sit, latte or flux.",
            autocompletion=completing.among("dit", "sit", "latte", "flux"),
        ),
    ] = "dit",
    steps: Annotated[
        int | None, typer.Option(help="Training steps of both models.", show_default="the recipe's")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run.", show_default="runs/demo-FAMILY")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that is no earlier demo.")
    ] = False,
    json: options.AsJson = False,
) -> None:
    """Run the whole chain on a small shipped model, on a CPU, in minutes.

    Converts a DiT (or SiT, or Latte) that was trained on Fashion-MNIST, fine-tunes it to half of its multiply-accumulates, fine-tunes the
    static model for as many steps as the control, profiles, samples both from the same noise, and exports. Nothing is pre-recorded.
    A FLUX draws from prompts and learns from its own complete predictions, so that its control is the shipped model itself.
    """
    if family not in FAMILIES:
        raise DyditError(
            f"There is no demo for '{family}'.",
            why=f"The package ships trained models of {', '.join(FAMILIES)}.",
            fix=did_you_mean(family, FAMILIES) or f"Pass --family {' or --family '.join(FAMILIES)}.",
        )
    folder = out or Path("runs") / f"demo-{family}"
    _make_room(folder, overwrite)
    summary = run(family, folder, steps)
    if json:
        console.emit_json(summary)
        return
    console.results().print(table(summary))
    console.say(f"{summary['verdict']}")
    warn_if_hardly_cheaper(summary["models"]["dynamic"]["ratio"], None)
    console.say(f"Pictures: {summary['comparison']}")
    console.say(f"Report, for a browser: {summary['report']}")
    console.note(
        f"{summary['seconds']:.0f} s on {summary['device']}, torch {summary['torch']}. Times are for one {summary['unit']} in batches "
        f"of {summary['latency_batch']}; losses are on the same {summary['held_out_images']} held-out {summary['unit']}s, timesteps "
        "and noise."
    )
    console.note(
        f"next: dydit profile --model {quoted(folder / 'dynamic')}   or, with your own model: dydit convert --help"
    )


def _make_room(folder: Path, overwrite: bool) -> None:
    """Refuse to write into a folder that is not an earlier demo's."""
    from dydit_cli.artifacts.writing import refuse_existing

    refuse_existing(
        folder, overwrite or (folder / SUMMARY).exists() or (folder / "converted" / "manifest.json").exists()
    )


def run(family: str, folder: Path, steps: int | None) -> dict[str, Any]:
    """Run all stages into ``folder`` and return the summary that is printed and saved."""
    from dydit_cli.artifacts import write_json
    from dydit_cli.cli.convert import convert_with_progress
    from dydit_cli.cli.export import export_with_notes
    from dydit_cli.cli.finetune import finetune_with_progress
    from dydit_cli.cli.prepare import prepare_with_progress
    from dydit_cli.cli.profile import profile_with_progress
    from dydit_cli.cli.sample import sample_with_progress
    from dydit_cli.recipe.schema import (
        ConvertSection,
        ExportSection,
        FinetuneSection,
        PrepareSection,
        ProfileSection,
        SampleSection,
    )
    from dydit_cli.sampling.comparison import side_by_side

    began = time.perf_counter()
    recipe = demo_recipe(family, folder, steps)
    yaml = recipe.to_yaml()
    training = _section(recipe, FinetuneSection)
    static_training = training.model_copy(
        update={"target_ratio": 1.0, "out": folder / "static", "evaluate_every": 0}
    )
    sampling = _section(recipe, SampleSection)
    preparing, exporting = recipe.get(PrepareSection), recipe.get(ExportSection)
    # Who learns from itself has nothing to learn with everything on: the control is the model as it was.
    distilled = training.loss == "distillation"
    say = _Stages(5 + (preparing is not None) + (exporting is not None) + (not distilled))

    if preparing is not None:
        say("prepare: encode pictures and captions")
        prepare_with_progress(preparing, yaml)
    say("convert the shipped model: rank heads and channels, insert routers")
    converted = convert_with_progress(_section(recipe, ConvertSection), yaml)
    say(f"fine-tune to half of the work ({training.steps} steps of {training.batch_size})")
    dynamic = finetune_with_progress(training, recipe)
    if not distilled:
        say("the control: fine-tune the static model for as many steps")
        finetune_with_progress(static_training)
    static = converted.out if distilled else str(static_training.out)
    say("profile: count and time")
    profile, _ = profile_with_progress(Request(_section(recipe, ProfileSection), recipe))
    say("sample static and dynamic from the same noise")
    dynamic_samples = sample_with_progress(sampling, yaml)
    static_samples = sample_with_progress(
        sampling.model_copy(
            update={
                "model": static,
                "execution": "static",
                "out": folder / "samples-static",
            }
        )
    )
    comparison = folder / "comparison.png"
    drawn = [
        ("static" if distilled else "static, fine-tuned as long", folder / "samples-static"),
        (f"dynamic, {dynamic_samples.trajectory_ratio:.0%} of the work", folder / "samples"),
    ]
    side_by_side(drawn, comparison)
    if exporting is not None:
        say("export as a diffusers pipeline")
        export_with_notes(exporting)
    say("measure what was lost, on held-out images")
    losses = held_out_losses(
        {"base": converted.out, "static": static, "dynamic": str(dynamic.out)},
        training.data,
    )
    summary = summarise(
        profile.to_json(),
        dynamic.ratio,
        losses,
        static_samples.seconds,
        dynamic_samples.seconds,
        static_samples.seconds if distilled else None,
    )
    summary |= {
        "family": family,
        "unit": "video" if family == "latte" else "image",
        "steps": training.steps,
        "distilled": distilled,
        "images": sampling.num_images,
        "target_ratio": training.target_ratio,
        "trajectory_ratio": dynamic_samples.trajectory_ratio,
        "comparison": str(comparison),
        "device": dynamic_samples.device,
        "torch": dynamic_samples.torch,
        "held_out_images": dynamic.held_out_images,
        "seconds": time.perf_counter() - began,
    }
    report = write_demo_report(folder, profile, str(dynamic.out), training.data, drawn, summary, yaml)
    summary["report"] = str(report)
    write_json(folder / SUMMARY, summary)
    return summary


def demo_recipe(family: str, folder: Path, steps: int | None) -> Recipe:
    """The built-in recipe of the demo with its outputs in ``folder``."""
    from dydit_cli.recipe.loading import load_recipe

    parts = {
        "prepare": "cache",
        "convert": "converted",
        "finetune": "dynamic",
        "profile": "profile",
        "sample": "samples",
        "export": "export",
    }
    name = f"demo/fashion-mnist-{family}"
    parts = {stage: part for stage, part in parts.items() if stage in load_recipe(name).sections}
    overrides = [f"{stage}.out={folder / part}" for stage, part in parts.items()]
    overrides += [f"{stage}.overwrite=true" for stage in parts]
    if "prepare" in parts:
        overrides += [f"{stage}.data={folder / parts['prepare']}" for stage in ("finetune", "profile")]
    if steps is not None:
        overrides.append(f"finetune.steps={steps}")
    return load_recipe(name, overrides)


def held_out_losses(models: dict[str, str], data: str) -> dict[str, float]:
    """The denoising loss of each model on the same held-out images, timesteps and noise; the dynamic one as it would run."""
    from dydit_cli.artifacts import load_model
    from dydit_cli.data import open_data
    from dydit_cli.objectives import held_out_loss, objective_of

    losses = {}
    for name, path in models.items():
        model = load_model(path, execution="compact" if name == "dynamic" else "static")
        source = open_data(data, geometry=model.geometry).held_out
        losses[name] = held_out_loss(model, source, objective_of(model))
    return losses


def summarise(
    profile: dict[str, Any],
    ratio: float,
    losses: dict[str, float],
    static_seconds: float,
    dynamic_seconds: float,
    base_seconds: float | None = None,
) -> dict[str, Any]:
    """Put what was measured into one record, one entry a model.

    Args:
        profile: The profile of the dynamic model, as ``dydit profile --json`` prints it.
        ratio: Realised share of attention and MLP MACs.
        losses: Held-out loss of base, static and dynamic.
        static_seconds: Of sampling with the static model.
        dynamic_seconds: Of sampling the same images with the dynamic model.
        base_seconds: Of sampling them with the base model, where it is the control.
    """
    latency = profile["latency"]
    batch = latency["batch"]
    static = {
        "mmacs": profile["static_gmacs"] * 1e3,
        "ratio": 1.0,
        "ms_per_image": latency["static_ms"] / batch,
    }
    dynamic = {"mmacs": profile["gmacs"] * 1e3, "ratio": ratio, "ms_per_image": latency["compact_ms"] / batch}
    models = {
        "base": {
            **static,
            "loss": losses["base"],
            "sampling_seconds": base_seconds,
        },
        "static": {**static, "loss": losses["static"], "sampling_seconds": static_seconds},
        "dynamic": {**dynamic, "loss": losses["dynamic"], "sampling_seconds": dynamic_seconds},
    }
    saved = 1 - models["dynamic"]["mmacs"] / models["static"]["mmacs"]
    change = models["dynamic"]["loss"] / models["static"]["loss"] - 1
    return {
        "models": models,
        "total_ratio": profile["total_ratio"],
        "time_ratio": latency["ratio"],
        "time_ratio_interval": latency["interval"],
        "latency_batch": batch,
        "verdict": f"The dynamic model executes {saved:.0%} fewer multiply-accumulates than the static one, takes "
        f"{latency['ratio']:.2f} of its time a forward pass, and its held-out loss is {change:+.1%}.",
    }


def table(summary: dict[str, Any]) -> Table:
    """The summary as a table, one row a model."""
    from rich.table import Table

    rows = comparison_rows(summary)
    drawn = Table(
        title=f"{summary['family']} on Fashion-MNIST, target {summary['target_ratio']:g}",
        title_justify="left",
    )
    for place, column in enumerate(rows[0]):
        drawn.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        drawn.add_row(*row.values())
    return drawn


def comparison_rows(summary: dict[str, Any]) -> list[dict[str, str]]:
    """What became of each model: column -> words."""
    titles = {
        "base": "base, as shipped",
        "static": f"static, fine-tuned {summary['steps']} steps",
        "dynamic": f"dynamic, fine-tuned {summary['steps']} steps",
    }
    rows = []
    for name, title in titles.items():
        if name == "static" and summary["distilled"]:
            continue
        entry = summary["models"][name]
        sampling = entry["sampling_seconds"]
        rows.append(
            {
                "model": title,
                "MMACs / forward": f"{entry['mmacs']:.1f}",
                "ratio": f"{entry['ratio']:.3f}",
                f"ms / {summary['unit']}": f"{entry['ms_per_image']:.3f}",
                f"s for {summary['images']} samples": "" if sampling is None else f"{sampling:.1f}",
                "held-out loss": f"{entry['loss']:.5f}",
            }
        )
    return rows


def write_demo_report(
    folder: Path,
    report: ProfileReport,
    model: str,
    data: str,
    rows: Sequence[tuple[str, Path]],
    summary: dict[str, Any],
    recipe_yaml: str,
) -> Path:
    """Write the page of HTML that shows what the demo made.

    Args:
        folder: Of the run.
        report: The profile of the dynamic model.
        model: Its folder.
        data: Whose held-out samples show which tokens are kept.
        rows: (title, folder with ``samples.npz``) of static and dynamic samples.
        summary: Of the run.
        recipe_yaml: Of the run.
    """
    import numpy as np

    from dydit_cli.artifacts import load_model
    from dydit_cli.cli.profile import write_report
    from dydit_cli.profiling.inputs import find_inputs
    from dydit_cli.reporting.content import SampleRow, Samples

    loaded = load_model(model, convention="native")
    inputs = find_inputs(loaded.geometry, data, Path(model), report.settings["timesteps"], seed=0)
    drawn = []
    for title, place in rows:
        with np.load(place / "samples.npz") as archive:
            drawn.append(SampleRow(title, archive["arr_0"][:REPORT_SAMPLES]))
    names = tuple("" for _ in drawn[0].images)
    path = folder / "report.html"
    write_report(
        path,
        report,
        loaded,
        folder=model,
        inputs=inputs,
        samples=Samples(tuple(drawn), names, "The same noise in each column."),
        seed=0,
        models=comparison_rows(summary),
        recipe_yaml=recipe_yaml,
    )
    return path


def _section(recipe: Recipe, kind: type[AnySection]) -> AnySection:
    """A stage's section of the demo's recipe, which has all of them."""
    section = recipe.get(kind)
    if section is None:
        raise TypeError(f"the demo's recipe lacks {kind.stage}")
    return section


class _Stages:
    """Says which stage of how many begins.

    Args:
        total: How many there are.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0

    def __call__(self, what: str) -> None:
        self._done += 1
        console.note(f"[{self._done}/{self._total}] {what}", style="bold")
