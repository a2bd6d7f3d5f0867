"""`dydit profile`: what a model executes, what that costs, and what it takes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dydit_cli.cli import completing, console, options, stage
from dydit_cli.cli.progress import progress_bar
from dydit_cli.cli.standing import beside, warn_if_hardly_cheaper
from dydit_cli.errors import DyditError
from dydit_cli.shell import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from dydit_cli.cli.stage import Request
    from dydit_cli.families.dynamic_model import DynamicModel
    from dydit_cli.profiling.inputs import Inputs
    from dydit_cli.profiling.latency import LatencyReport
    from dydit_cli.profiling.profile import ProfileReport, ProfileSettings, Progress
    from dydit_cli.recipe.schema import ProfileSection, SampleSection
    from dydit_cli.reporting.content import Samples

EXAMPLES = (
    "dydit profile --model runs/t --out runs/p",
    "dydit profile --model runs/t --report report.html",
    "dydit profile --model runs/t --json --no-latency",
    "dydit profile --preset dit-xl/2",
    "dydit profile demo/fashion-mnist-dit repetitions=31",
)

TIME = "Time and memory"

TRAJECTORY_IMAGES = 8

REPORT_LEVELS = 16
"""Noise levels that the slider of a report goes through."""

HEAVY_GMACS = 10.0
"""Models above this are neither timed nor sampled from on a CPU unless that is asked for: it would take many minutes."""


UNSURE = 0.3
"""An interval wider than this share of its ratio says little."""

OVERHEAD = 0.1
"""Time ratios that exceed the ratio of MACs by more than this are explained."""


def profile(
    context: typer.Context,
    arguments: options.RecipeArguments = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a converted, fine-tuned or exported model.", metavar="FOLDER"),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A published size instead, such as dit-xl/2: the static model.",
            autocompletion=completing.choices("preset"),
        ),
    ] = None,
    budget: Annotated[float | None, options.budget()] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Held-out samples that the token routers see.",
            show_default="what the model was trained on",
            autocompletion=completing.choices("data"),
        ),
    ] = None,
    images: Annotated[int | None, typer.Option(help="Held-out samples.", show_default="1000")] = None,
    timesteps: Annotated[int | None, typer.Option(help="Noise levels.", show_default="50")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples of a forward while decisions are counted.", show_default="64")
    ] = None,
    trajectory: Annotated[
        bool | None,
        typer.Option(
            "--trajectory/--no-trajectory",
            help="Also sample a few images and report the ratio on their way.",
            show_default="trajectory",
        ),
    ] = None,
    latency: Annotated[
        bool | None,
        typer.Option(
            "--latency/--no-latency",
            help=f"Measure time and memory; on a CPU only up to {HEAVY_GMACS:g} GMACs unless given.",
            show_default="latency",
            rich_help_panel=TIME,
        ),
    ] = None,
    latency_batch: Annotated[
        int | None,
        typer.Option(help="Images of a forward.", show_default="4", rich_help_panel=TIME),
    ] = None,
    repetitions: Annotated[
        int | None,
        typer.Option(help="Interleaved rounds.", show_default="11", rich_help_panel=TIME),
    ] = None,
    compile: Annotated[  # noqa: A002
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Time static and compact execution with blocks compiled by torch.compile.",
            show_default="no-compile",
            rich_help_panel=TIME,
        ),
    ] = None,
    graphs: Annotated[
        bool | None,
        typer.Option(
            "--graphs/--no-graphs",
            help="Time static and compact execution with steps recorded as CUDA graphs.",
            show_default="no-graphs",
            rich_help_panel=TIME,
        ),
    ] = None,
    dtype: Annotated[str | None, options.dtype(rich_help_panel=TIME)] = None,
    device: Annotated[str | None, options.device()] = None,
    seed: options.Seed = None,
    report: Annotated[
        str | None,
        typer.Option(
            help="One HTML file that shows all of it, to explore in a browser, offline.",
            metavar="FILE",
            show_default="none is written",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the JSON file and the heat maps.", show_default="none is written"),
    ] = None,
    overwrite: options.Overwrite = None,
    json: options.AsJson = False,
) -> None:
    """Count what a model executes at each noise level, and measure its time and memory.

    Multiply-accumulates by formula, checked against fvcore and torch on the graph that really runs; the ratio to the static
    model; heads, groups and tokens by timestep and block; parameters; interleaved time and peak memory of static, dense and
    compact execution. With --out also heat maps; with --report a page that shows them and samples of both models.
    """
    from dydit_cli.cli.profile_tables import tables
    from dydit_cli.recipe.schema import ProfileSection

    request = stage.resolve(context, ProfileSection)
    found, files = profile_with_progress(request)
    if json:
        console.emit_json(found.to_json())
    else:
        for table in tables(found):
            console.results().print(table)
            console.say("")
        if files:
            console.say(f"Written to {request.section.out}: {', '.join(files)}")
        if request.section.report is not None:
            console.say(f"Report: {request.section.report}")
    _say_how(found, request.section)
    if request.section.preset is None:
        warn_if_hardly_cheaper(found.ratio, None)
    console.note(f"next: {_next_command(found, request.section)}")


def profile_with_progress(request: Request[ProfileSection]) -> tuple[ProfileReport, list[str]]:
    """Run a profile with a progress bar on stderr; return the report, and the files written if there is an ``out``."""
    from dydit_cli.artifacts.writing import refuse_existing
    from dydit_cli.devices import find_device
    from dydit_cli.execution.graphs import require_cuda
    from dydit_cli.families.family import require
    from dydit_cli.families.registry import family_of
    from dydit_cli.objectives import objective_of
    from dydit_cli.profiling.inputs import find_inputs
    from dydit_cli.profiling.profile import profile as run
    from dydit_cli.profiling.profile import refuse_baked
    from dydit_cli.profiling.token_maps import token_maps
    from dydit_cli.profiling.writing import write_profile
    from dydit_cli.recipe.schema import SampleSection

    section = request.section
    if section.out is not None:
        refuse_existing(section.out, section.overwrite)
    if section.report is not None:
        check_report_file(Path(section.report).expanduser(), section.overwrite)
    device = find_device(section.device)
    if section.graphs:
        require_cuda(device)
    with progress_bar() as progress:
        task = progress.add_task("building the model" if section.preset else "loading the model", total=None)

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        model = _model(section, device)
        refuse_baked(model)
        inputs: Inputs | None = None
        if section.model is not None:
            folder = Path(section.model).expanduser()
            if section.data is not None:
                require(family_of(model), "--data")
            inputs = find_inputs(
                model.geometry,
                section.data,
                folder,
                section.timesteps,
                section.seed,
                _prompt(model, section.seed),
            )
        measure_trajectory, measure_latency = _affordable(section, model)
        trajectory_ratio, samples = None, None
        if measure_trajectory and section.model is not None:
            sampling = request.recipe.get(SampleSection)
            if section.report is not None:
                base = _base_of(Path(section.model).expanduser(), model)
                samples, trajectory_ratio = _samples(model, base, sampling, inputs, section.seed, show)
            else:
                trajectory_ratio = _trajectory_ratio(model, sampling, inputs, section.seed, show)
        report = run(
            model,
            _settings(section, measure_latency),
            inputs=inputs,
            trajectory_ratio=trajectory_ratio,
            on_progress=show,
        )
        files: list[str] = []
        if section.out is not None:
            show("pictures", 0, 1)
            maps = None
            if inputs is not None and inputs.real:
                maps = token_maps(model, inputs.source, objective_of(model), section.seed)
            files = write_profile(
                section.out,
                report,
                maps=maps,
                settings=section.model_dump(mode="json"),
                parent=section.model,
                recipe_yaml=request.recipe.to_yaml(),
                device=device,
                overwrite=section.overwrite,
            )
        if section.report is not None:
            show("report", 0, 1)
            write_report(
                Path(section.report).expanduser(),
                report,
                model,
                folder=section.model,
                inputs=inputs,
                samples=samples,
                seed=section.seed,
            )
    return report, files


def write_report(
    path: Path,
    report: ProfileReport,
    model: DynamicModel,
    *,
    folder: str | Path | None,
    inputs: Inputs | None,
    samples: Samples | None,
    seed: int,
    models: Sequence[Mapping[str, Any]] | None = None,
    recipe_yaml: str | None = None,
) -> None:
    """Write the HTML report of a profile: see `reporting.content.gather`; tokens are shown where the model saw real samples."""
    from dydit_cli.objectives import objective_of
    from dydit_cli.profiling.token_maps import token_maps
    from dydit_cli.reporting.content import gather
    from dydit_cli.reporting.page import write_page

    maps = None
    if inputs is not None and inputs.real and model.execution != "static":
        maps = token_maps(model, inputs.source, objective_of(model), seed, levels=REPORT_LEVELS)
    content = gather(
        report,
        model,
        folder=folder,
        maps=maps,
        samples=samples,
        models=models,
        recipe_yaml=recipe_yaml,
    )
    write_page(path, content)


def check_report_file(path: Path, overwrite: bool) -> None:
    """See that a report can be written where it is asked for.

    Raises:
        DyditError: If a folder is there, or a file that is not to be replaced.
    """
    if path.is_dir():
        raise DyditError(
            f"{path} is a folder.",
            why="A report is one file of HTML.",
            fix=f"Pass --report {path / 'report.html'}.",
        )
    if path.exists() and not overwrite:
        raise DyditError(
            f"{path} exists already.",
            why="Replacing results silently would lose them.",
            fix="Choose another --report, or pass --overwrite to replace it.",
        )


def _base_of(folder: Path, model: DynamicModel) -> DynamicModel | None:
    """The conversion that a model is or was fine-tuned from, whose complete model is the source's; None where it is gone."""
    from dydit_cli.artifacts import load_model
    from dydit_cli.artifacts.ancestry import ancestors, manifest_of

    manifest = manifest_of(folder) or {}
    places = [str(folder)] if manifest.get("stage") == "convert" else []
    places += [
        each.path for each in ancestors(manifest) if each.stage == "convert" and each.state == "present"
    ]
    for place in places:
        try:
            base = load_model(place, execution="static", device=model.device, convention="native")
        except DyditError:
            continue
        if base.geometry.sample_shape == model.geometry.sample_shape:
            return base
    return None


def _samples(
    model: DynamicModel,
    base: DynamicModel | None,
    sampling: SampleSection | None,
    inputs: Inputs | None,
    seed: int,
    show: Progress,
) -> tuple[Samples, float]:
    """A few images of the static and the dynamic model from the same noise, and the mean ratio on the way of the dynamic ones."""
    from dydit_cli.reporting.drawing import draw_samples

    samples, ratios = draw_samples(
        model,
        base=base,
        num_images=TRAJECTORY_IMAGES,
        vae=None if sampling is None else sampling.vae,
        seed=seed,
        on_progress=lambda done, total: show("sampling", done, total),
        **_sampling_settings(sampling, inputs),
    )
    return samples, sum(ratios) / len(ratios)


def _model(section: ProfileSection, device: torch.device) -> DynamicModel:
    """The folder's model in compact execution, or the preset's in static execution."""
    if section.preset is None:
        from dydit_cli.artifacts import load_model

        return load_model(
            Path(str(section.model)).expanduser(), device=device, convention="native", budget=section.budget
        )
    from dydit_cli.families.registry import preset_named

    if section.data is not None:
        console.warn("a preset is the static model, which looks at no data; --data is not used.")
    family, config = preset_named(section.preset)
    made = family.build(config).eval().requires_grad_(False).to(device)
    return made.set_execution("static")


def _prompt(model: DynamicModel, seed: int) -> Any:
    """What goes with noise in a model that reads prompts; None for a model that reads labels."""
    import torch

    _, condition = model.example_inputs(1, seed)
    return None if isinstance(condition, torch.Tensor) else condition


def _settings(section: ProfileSection, latency: bool) -> ProfileSettings:
    import torch

    from dydit_cli.profiling.profile import ProfileSettings

    return ProfileSettings(
        images=section.images,
        timesteps=section.timesteps,
        batch_size=section.batch_size,
        latency=latency,
        latency_batch=section.latency_batch,
        repetitions=section.repetitions,
        compile=section.compile,
        graphs=section.graphs,
        dtype=getattr(torch, section.dtype),
        seed=section.seed,
    )


def _affordable(section: ProfileSection, model: DynamicModel) -> tuple[bool, bool]:
    """Whether to sample and whether to time: as set, but on a CPU not for large models unless it was asked for."""
    from dydit_cli.families.registry import family_of
    from dydit_cli.flops import macs_of

    sampled = section.trajectory and "dydit sample" not in family_of(model).missing
    heavy = model.device.type == "cpu" and macs_of(model.geometry).total > HEAVY_GMACS * 1e9
    asked = section.model_fields_set
    return (
        sampled and ("trajectory" in asked or not heavy),
        section.latency and ("latency" in asked or not heavy),
    )


def _trajectory_ratio(
    model: DynamicModel, sampling: SampleSection | None, inputs: Inputs | None, seed: int, show: Progress
) -> float:
    """The mean ratio along sampling trajectories: those of the recipe's `sample` section, else 50 steps with the usual guidance."""
    from dydit_cli.sampling.generate import generate

    ratios: list[float] = []
    for batch in generate(
        model,
        num_images=TRAJECTORY_IMAGES,
        batch_size=TRAJECTORY_IMAGES,
        seed=seed,
        on_progress=lambda done: show("sampling", int(done), TRAJECTORY_IMAGES),
        **_sampling_settings(sampling, inputs),
    ):
        ratios += batch.ratios.tolist()
    return sum(ratios) / len(ratios)


def _sampling_settings(sampling: SampleSection | None, inputs: Inputs | None) -> dict[str, Any]:
    """How to sample: as the recipe's `sample` section says, from the inputs' prompts where the model reads such."""
    from dydit_cli.data.conditions import conditions_of
    from dydit_cli.families.text_condition import TextCondition

    chosen: dict[str, Any] = (
        {}
        if sampling is None
        else sampling.model_dump(include={"steps", "guidance", "guidance_channels", "sampler"})
    )
    if inputs is not None:
        conditions = conditions_of(inputs.source, range(min(TRAJECTORY_IMAGES, len(inputs.source))))
        if isinstance(conditions, TextCondition):
            chosen["conditions"] = conditions
    return chosen


def _say_how(report: ProfileReport, section: ProfileSection) -> None:
    """Say on stderr what the numbers rest on."""
    console.note("MACs are multiply-accumulates; what the papers call FLOPs are these.")
    if report.inputs is not None:
        say = console.note if report.inputs["real"] else console.warn
        say(report.inputs["note"])
    for name, counted in report.counted.items():
        if counted.timed:
            console.note(
                f"The formula leaves out TD-LoRA, for which the {name} model takes {counted.deviation:.2%} more here."
            )
        elif not counted.agrees:
            console.warn(
                f"the counters differ from the formula of the {name} model by {counted.deviation:.2%}; please report this."
            )
    if report.latency is None and section.latency:
        console.note(
            f"Time was not measured: above {HEAVY_GMACS:g} GMACs it takes long on a CPU. Pass --latency for it."
        )
    if report.latency is not None:
        _say_how_sure(report.latency, report.total_ratio)


def _say_how_sure(latency: LatencyReport, total_ratio: float) -> None:
    """Say on stderr what a measured time is worth."""
    low, high = latency.interval
    if high - low > UNSURE * latency.ratio:
        console.warn(
            "the times vary so much that their ratio is not to be trusted: something else keeps the machine busy. Try again "
            "when it is idle, with OMP_NUM_THREADS=1, or with more --repetitions."
        )
    elif latency.ratio > total_ratio + OVERHEAD:
        console.note(
            "Time falls less than MACs here: starting operations, LayerNorm and adaLN cost the same at any width, and weigh "
            "more in a small model or batch."
        )


def _next_command(report: ProfileReport, section: ProfileSection) -> str:
    from dydit_cli.families.registry import family_named

    if section.preset is not None:
        return f"dydit convert --checkpoint CHECKPOINT --family {report.model['family']} --out runs/converted"
    missing = family_named(report.model["family"]).missing
    if "dydit sample" in missing:
        return missing["dydit sample"]
    folder = str(section.model)
    model = quoted(folder)
    if report.ratio > 0.9999:  # untrained routers keep everything
        return f"dydit finetune --model {model} --data DATA --steps 50000 --target-ratio 0.5 --out {beside(folder, 'finetuned')}"
    what = "--prompt PROMPT --pipeline PIPELINE" if "text_tokens" in report.model else "--num-images 8"
    return f"dydit sample --model {model} {what} --out {beside(folder, 'samples')}"
