"""`dydit finetune`: train a converted model to its target ratio."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dydit_cli.cli import completing, console, options, stage
from dydit_cli.cli.launched import run_in_processes
from dydit_cli.cli.progress import progress_bar
from dydit_cli.cli.standing import HARDLY_CHEAPER, next_stage
from dydit_cli.shell import quoted

if TYPE_CHECKING:
    from rich.table import Table

    from dydit_cli.data import Source
    from dydit_cli.families.dynamic_model import DynamicModel
    from dydit_cli.recipe.loading import Recipe
    from dydit_cli.recipe.schema import FinetuneSection
    from dydit_cli.training import FinetuneResult, FineTuning, StepReport

EXAMPLES = (
    "dydit finetune demo/fashion-mnist-dit --model runs/c --out runs/t",
    "dydit finetune dit-xl-2-256/full data=latents.safetensors target_ratio=0.3 --dry-run",
    "dydit finetune runs/t/recipe.yaml --resume",
)

TERMINATED = 143
TOLERANCE = 0.02
SCHEDULE, OPTIMISER, PLACE = "Schedule", "Optimiser", "Where and how often"


def finetune(
    context: typer.Context,
    arguments: options.RecipeArguments = None,
    model: Annotated[str | None, typer.Option(help="Folder of a converted model.", metavar="FOLDER")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Image folder, IDX folder, .npz, ready latents, or fashion-mnist-subset; folder of videos or "
            "moving-fashion-mnist for a video model.",
            metavar="PATH|NAME",
            autocompletion=completing.choices("data"),
        ),
    ] = None,
    target_ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of attention and MLP MACs to keep; 1 trains the static control.", show_default="0.5"
        ),
    ] = None,
    seed: options.Seed = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.", rich_help_panel=SCHEDULE)] = None,
    full_width_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps with a target of 1 before the ramp.", show_default="100", rich_help_panel=SCHEDULE
        ),
    ] = None,
    ramp_steps: Annotated[
        int | None,
        typer.Option(help="Steps from 1 down to the target.", show_default="1000", rich_help_panel=SCHEDULE),
    ] = None,
    complete_branch_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps that also train the complete model (XL).", show_default="0", rich_help_panel=SCHEDULE
        ),
    ] = None,
    gating: Annotated[
        str | None,
        typer.Option(
            help="gumbel (the paper) or annealed (noise on masks falls to nothing).",
            show_default="gumbel",
            rich_help_panel=SCHEDULE,
            autocompletion=completing.choices("gating"),
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="full (all weights), lora or td-lora (adapters beside the routers; less memory).",
            show_default="full",
            rich_help_panel=OPTIMISER,
            autocompletion=completing.choices("method"),
        ),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(help="Rank of the adapters.", show_default="4", rich_help_panel=OPTIMISER),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples of a step.", show_default="64", rich_help_panel=OPTIMISER)
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="AdamW's, constant.", show_default="0.0001", rich_help_panel=OPTIMISER),
    ] = None,
    router_learning_rate: Annotated[
        float | None,
        typer.Option(help="The routers' own.", show_default="learning rate", rich_help_panel=OPTIMISER),
    ] = None,
    ema_decay: Annotated[
        float | None,
        typer.Option(
            help="Of the averaged weights that are saved.", show_default="0.9999", rich_help_panel=OPTIMISER
        ),
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Clip gradients.", show_default="off", rich_help_panel=OPTIMISER)
    ] = None,
    device: Annotated[str | None, options.device(rich_help_panel=PLACE)] = None,
    mixed_precision: Annotated[
        str | None,
        typer.Option(
            help="no, bf16 or fp16.",
            show_default="no",
            rich_help_panel=PLACE,
            autocompletion=completing.choices("mixed_precision"),
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="Processes that share every batch, a GPU each.", show_default="1", rich_help_panel=PLACE
        ),
    ] = None,
    num_workers: Annotated[
        int | None, typer.Option(help="Processes that read data.", show_default="0", rich_help_panel=PLACE)
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints.", show_default="500", rich_help_panel=PLACE),
    ] = None,
    sample_every: Annotated[
        int | None,
        typer.Option(help="Steps between sample grids.", show_default="0", rich_help_panel=PLACE),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--no-resume", help="Continue the run in --out.", show_default="no-resume"),
    ] = None,
    overwrite: options.Overwrite = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything, print the resolved recipe, draw one batch; train nothing."
        ),
    ] = False,
    json: options.AsJson = False,
) -> None:
    """Train a converted model until it needs only its target share of the static model's work.

    Metrics, checkpoints and sample grids go to --out while it runs; the averaged weights are written there at
    the end. Ctrl-C writes a checkpoint, and --resume continues it bit for bit.
    """
    from dydit_cli.recipe.schema import FinetuneSection

    request = stage.resolve(context, FinetuneSection)
    if dry_run:
        from dydit_cli.cli.dry_run import show

        show(request.section, request.recipe, json)
        return
    run_in_processes(context, request.section.processes)
    result = finetune_with_progress(request.section, request.recipe)
    for warning in judgement(result):
        console.warn(warning)
    if json:
        console.emit_json(result.as_dict())
        return
    console.results().print(summary(result))
    console.say(f"Written to {result.out}.")
    following = next_stage(request.recipe, result.out, ("profile",))
    console.note(f"next: {following or f'dydit profile --model {quoted(result.out)}'}")


def finetune_with_progress(section: FinetuneSection, recipe: Recipe | None = None) -> FinetuneResult:
    """Run a fine-tuning run with a progress display on stderr.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
        SystemExit: the same after a polite request to terminate.
    """
    from dydit_cli.training import prepare

    with progress_bar("{task.fields[state]}") as progress:
        task = progress.add_task("loading model and data", total=section.steps, state="")
        run = prepare(section, recipe=recipe)
        for warning in run.warnings:
            console.warn(warning)
        if run.complete:
            console.note(f"The run in {section.out} is complete; nothing is left to do.")
            return run.finish()
        progress.update(task, description="fine-tuning", completed=run.done)
        quiet = not progress.console.is_terminal
        display = Display()
        with stop_requests() as request:
            for report in run.steps(
                on_sample=grid_sampler(recipe, run.data.held_out),
                should_stop=lambda: request.signal is not None,
            ):
                for told in report.notes:
                    console.warn(told)
                state = display.show(report)
                progress.update(task, completed=report.step, state=state)
                if quiet and report.ema_ratio is not None:
                    console.note(f"step {report.step}/{section.steps}: {state}")
            if run.interrupted:
                leave(run, section, request)
        progress.update(task, description="measuring the result")
        return run.finish()


class Display:
    """The words beside the progress bar; speeds are averaged, the last evaluation stays until the next."""

    def __init__(self) -> None:
        self._speed = 0.0
        self._loss = 0.0
        self._evaluated = ""

    def show(self, report: StepReport) -> str:
        """What to say after a step."""
        first = self._speed == 0.0
        self._speed = (
            report.images_per_second if first else 0.9 * self._speed + 0.1 * report.images_per_second
        )
        self._loss = (
            report.terms["denoising"] if first else 0.95 * self._loss + 0.05 * report.terms["denoising"]
        )
        realised = report.ema_ratio if report.ema_ratio is not None else report.realised_ratio
        if realised is not None:
            self._evaluated = f", EMA {realised:.3f}"
        return (
            f"loss {self._loss:.4f}  ratio {report.trained_ratio:.3f}{self._evaluated} -> "
            f"{report.target:.3f}  "
            f"{self._speed:.0f} images/s"
        )


@dataclass
class StopRequest:
    """A signal that asked the run to stop, if any."""

    signal: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request that the run sees between two steps; a second Ctrl-C
    stops at once.
    """
    request = StopRequest()

    def ask(number: int, frame: object) -> None:
        if request.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = number

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(run: FineTuning, section: FinetuneSection, request: StopRequest) -> None:
    """Say how to go on after a stop, and stop."""
    recipe = quoted(Path(section.out) / "recipe.yaml")
    console.note(f"Stopped after step {run.done} of {section.steps}; a checkpoint was written.")
    console.note(f"next: dydit finetune {recipe} --resume")
    if request.signal == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(TERMINATED)


def grid_sampler(
    recipe: Recipe | None, held_out: Source | None = None
) -> Callable[[DynamicModel, int, Path], None]:
    """How a run draws its sample grids: as the recipe's sample section says, 16 images at most, from the
    same noise every time.
    """
    from dydit_cli.recipe.schema import SampleSection

    section = recipe.get(SampleSection) if recipe is not None else None
    keys = (
        "classes",
        "num_images",
        "steps",
        "guidance",
        "guidance_channels",
        "sampler",
        "seed",
        "batch_size",
    )
    settings = section.model_dump(include=set(keys)) if section is not None else {}
    settings["num_images"] = min(16, settings.get("num_images", 16))

    def draw(model: DynamicModel, step: int, path: Path) -> None:
        import torch

        from dydit_cli.artifacts import atomic_write
        from dydit_cli.data.conditions import conditions_of
        from dydit_cli.families.text_condition import TextCondition
        from dydit_cli.sampling.decoding import makes_pixels
        from dydit_cli.sampling.generate import generate
        from dydit_cli.sampling.video_writing import picture_of
        from dydit_cli.sampling.writing import save_png

        given: dict[str, Any] = dict(settings)
        if held_out is not None:
            conditions = conditions_of(held_out, range(min(settings["num_images"], len(held_out))))
            if isinstance(conditions, TextCondition):
                # The prompts of held-out samples, without their pictures.
                given["conditions"] = conditions
        samples = torch.cat([batch.samples for batch in generate(model, **given)])
        if not makes_pixels(samples.shape[-3]):
            # There is no autoencoder while training; three latent channels as colours show whether structure
            # emerges.
            samples = samples[..., :3, :, :] / 3
        with atomic_write(path) as temporary:
            save_png(picture_of(samples), temporary)

    return draw


def summary(result: FinetuneResult) -> Table:
    """The result as a table."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("steps", f"{result.steps}")
    target = f", target {result.target_ratio:g}"
    if result.time_ratio is not None:
        table.add_row("time", f"{result.time_ratio:.4f} of the static model's by the latency table{target}")
    table.add_row(
        "ratio",
        f"{result.ratio:.4f} ± {result.ratio_standard_error:.4f} of attention and MLP MACs"
        f"{target if result.time_ratio is None else ''} (averaged weights, {result.held_out_images} held-out images)",
    )
    if result.trained_ratio is not None and result.target_ratio < 1:
        table.add_row(
            "ratio in training", f"{result.trained_ratio:.4f}, masks as the last steps trained them"
        )
    if result.uncalibrated_ratio is not None:
        table.add_row(
            "calibration",
            f"{result.router_shift:+.3f} on all router logits; the ratio was {result.uncalibrated_ratio:.4f} on training samples",
        )
    table.add_row(
        "active",
        f"{result.heads:.1%} of heads, {result.groups:.1%} of channel groups, {result.tokens:.1%} of tokens",
    )
    table.add_row("held-out loss", f"{result.held_out_loss:.5f}")
    if result.images_per_second is not None:
        table.add_row("training", f"{result.seconds:.0f} s, {result.images_per_second:.0f} images/s")
    return table


def judgement(result: FinetuneResult) -> list[str]:
    """What a newcomer should know of a result that is not what was asked for."""
    warnings = []
    dynamic = result.target_ratio < 1
    ratio, kind = result.targeted, "work" if result.time_ratio is None else "time"
    if dynamic and ratio > HARDLY_CHEAPER:
        warnings.append(
            f"the model still {'does' if kind == 'work' else 'takes'} {ratio:.1%} of the static model's {kind}: it is hardly cheaper. "
            "Train more steps, "
            "shorten ramp_steps, or raise router_learning_rate."
        )
    elif abs(ratio - result.target_ratio) > TOLERANCE:
        warnings.append(
            f"the ratio of {ratio:.3f} is {abs(ratio - result.target_ratio):.3f} "
            f"{'above' if ratio > result.target_ratio else 'below'} its target. "
            + (
                "Training has to go on: resume with more steps, or lower ema_decay for short runs."
                if dynamic
                else "The routers of a static control are frozen; start it from a freshly converted model."
            )
        )
    return warnings
