"""`dydit bench`: how much of what the masks save in arithmetic is saved in time, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from dydit_cli.cli import completing, console, options
from dydit_cli.cli.progress import progress_bar
from dydit_cli.errors import DyditError

if TYPE_CHECKING:
    import torch

    from dydit_cli.benchmarking.report import BenchReport
    from dydit_cli.benchmarking.service import ServiceReport
    from dydit_cli.benchmarking.settings import BenchSettings

EXAMPLES = (
    "dydit bench --preset dit-xl/2 --blocks 2 --batch 1,4 --heads 8 --groups 11 --tokens 0.7",
    "dydit bench --preset dit-xl/2 --ratio 0.3,0.5,0.7 --batch 4 --out runs/bench",
    "dydit bench --model runs/t --batch 16,64 --steps 25",
    "dydit bench --model runs/t --service --batch 1,8 --json",
)

LONG_SECONDS = 600.0
"""A benchmark that is expected to take longer says so before."""

DEFAULT_RATIO = "0.5"
MASKS, MEASURING = "Masks", "Measuring"

UNSURE = 0.1
"""An interval wider than this share of its ratio says little."""

Number = TypeVar("Number", int, float)


def bench(
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a model; its own routers decide what is on.", metavar="FOLDER"),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A published size such as dit-xl/2: random weights, imposed masks.",
            autocompletion=completing.choices("preset"),
        ),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            help="Blocks of a preset.", show_default="2, all for sampling runs", rich_help_panel=MASKS
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            help="Heads that are on in every block, or all.",
            metavar="N",
            show_default="all",
            rich_help_panel=MASKS,
        ),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            help="Channel groups that are on, or all.",
            metavar="N",
            show_default="all",
            rich_help_panel=MASKS,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Shares of tokens that enter the MLP.",
            metavar="X,X,…",
            show_default="1",
            rich_help_panel=MASKS,
        ),
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(
            help="Shares of attention and MLP MACs, instead of heads, groups and tokens.",
            metavar="X,X,…",
            show_default="0.5 if none of these is given",
            rich_help_panel=MASKS,
        ),
    ] = None,
    masks: Annotated[
        str,
        typer.Option(
            help="scattered; changing: anew at each of five timesteps; prefix: the most important units.",
            rich_help_panel=MASKS,
            autocompletion=completing.among("scattered", "changing", "prefix"),
        ),
    ] = "scattered",
    batch: Annotated[
        str, typer.Option(help="Images of a forward or a sampling run.", metavar="N,N,…")
    ] = "1,4",
    steps: Annotated[
        int | None,
        typer.Option(
            help="Time whole sampling runs of so many steps, plan included.", show_default="forwards"
        ),
    ] = None,
    guidance: Annotated[float, typer.Option(help="Of sampling runs; 1 is none.")] = 1.5,
    service: Annotated[
        bool,
        typer.Option(
            "--service",
            help="Seconds an image and their spread, cold start, memory, images a minute; 50 steps unless --steps.",
        ),
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also time static and compact under torch.compile.")
    ] = False,
    graphs: Annotated[
        bool,
        typer.Option("--graphs", help="Also time static and compact as CUDA graphs; needs a CUDA device."),
    ] = False,
    token_capacity: Annotated[float | None, options.token_capacity()] = None,
    dense: Annotated[
        bool, typer.Option("--dense/--no-dense", help="Also time dense execution, which multiplies by masks.")
    ] = True,
    pairs: Annotated[
        int, typer.Option(help="Rounds, or requests with --service.", rich_help_panel=MEASURING)
    ] = 31,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads of torch; 0 is all.",
            show_default="1; all with --service",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    clock: Annotated[
        str,
        typer.Option(
            help="cpu (processor time), wall, or auto: cpu for one thread on a CPU, wall otherwise.",
            rich_help_panel=MEASURING,
            autocompletion=completing.among("auto", "cpu", "wall"),
        ),
    ] = "auto",
    device: Annotated[str, options.device(show_default=True, rich_help_panel=MEASURING)] = "auto",
    dtype: Annotated[str, options.dtype(show_default=True, rich_help_panel=MEASURING)] = "float32",
    seed: Annotated[int, typer.Option(help="Of weights, masks and inputs.", rich_help_panel=MEASURING)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the JSON file and the picture.", show_default="none")
    ] = None,
    latency_table: Annotated[
        Path | None,
        typer.Option(
            help="Measure a table of times for finetune's `target: latency` instead, and write it there.",
            metavar="FILE",
            show_default="none",
        ),
    ] = None,
    check_table: Annotated[
        Path | None,
        typer.Option(
            help="Compare what such a table says of the model with its time.",
            metavar="FILE",
            show_default="none",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing folder or table.")
    ] = False,
    json: options.AsJson = False,
) -> None:
    """Measure how much of what the masks save in arithmetic is saved in time.

    Static, dense and compact execution run in turn, in an order that is reversed every other round; "static" is the faster of
    dydit's own and diffusers' model. Printed are the ideal (the ratio of multiply-accumulates), the median of the rounds' time
    ratios with its 95 % bootstrap interval, and the efficiency: ideal / time ratio.
    """
    from dydit_cli.artifacts.writing import refuse_existing
    from dydit_cli.benchmarking.settings import BenchSettings
    from dydit_cli.devices import find_device

    if ratio is None and (heads, groups, tokens) == (None, None, None):
        ratio = DEFAULT_RATIO if preset is not None else None
    elif ratio is not None and (heads, groups, tokens) != (None, None, None):
        raise DyditError(
            "--ratio does not go with --heads, --groups or --tokens.",
            why="A ratio chooses all three.",
            fix="Leave out --ratio, or the others.",
        )
    settings = BenchSettings(
        model=model,
        preset=preset,
        blocks=blocks,
        batch=_numbers("batch", batch, int),
        heads=_units("heads", heads),
        groups=_units("groups", groups),
        tokens=None if tokens is None else _numbers("tokens", tokens, float),
        ratio=() if ratio is None else _numbers("ratio", ratio, float),
        masks=masks,
        steps=50 if service and steps is None else steps,
        guidance=guidance,
        pairs=pairs,
        threads=threads if threads is not None else int(not service),
        clock=clock,
        dense=dense,
        compile=compiled,
        graphs=graphs,
        token_capacity=token_capacity,
        dtype=dtype,
        seed=seed,
    )
    place = find_device(device)
    if latency_table is not None or check_table is not None:
        from dydit_cli.cli import latency

        if latency_table is not None:
            latency.measure(settings, place, latency_table, overwrite, json)
        if check_table is not None:
            latency.check(settings, place, check_table, json)
        return
    if out is not None:
        refuse_existing(out, overwrite)
    report = run_with_progress(settings, place, service)
    files: list[str] = []
    if out is not None:
        from dydit_cli.benchmarking.writing import write_bench

        files = write_bench(out, report, device=place, overwrite=overwrite)
    if json:
        console.emit_json(report.to_json())
    else:
        _show(report)
    if files:
        console.note(f"Written to {out}: {', '.join(files)}")


def run_with_progress(
    settings: BenchSettings, device: torch.device, service: bool
) -> BenchReport | ServiceReport:
    """Measure with a progress bar on stderr, and a warning if that will take long."""
    from dydit_cli.benchmarking.bench import bench as run
    from dydit_cli.benchmarking.service import serve
    from dydit_cli.cli.bench_tables import span

    def estimate(expected: float) -> None:
        if expected > LONG_SECONDS:
            console.warn(
                f"this will take about {span(expected)}; fewer --pairs, --blocks or --batch take less. Ctrl-C stops it."
            )

    measure: Callable[..., BenchReport | ServiceReport] = serve if service else run
    with progress_bar() as progress:
        task = progress.add_task("loading", total=None)
        return measure(
            settings,
            device,
            on_progress=lambda what, done, total: progress.update(
                task, description=what, completed=done, total=total
            ),
            on_estimate=estimate,
        )


def _show(report: BenchReport | ServiceReport) -> None:
    from dydit_cli.benchmarking.report import BenchReport
    from dydit_cli.cli.bench_tables import bench_table, service_tables

    if not isinstance(report, BenchReport):
        requests, start = service_tables(report)
        console.results().print(requests)
        console.results().print(start)
        console.note(f"{report.device}, torch {report.versions['torch']}; {report.note}")
        return
    console.results().print(bench_table(report))
    console.note(
        f"Medians of {report.rows[0].pairs} rounds on {report.device}, torch {report.versions['torch']}; {report.note}"
    )
    if any(row.interval[1] - row.interval[0] > UNSURE * row.time_ratio for row in report.rows):
        console.warn(
            "an interval is wide: something else keeps the machine busy, or there are too few --pairs to tell."
        )


def _units(name: str, text: str | None) -> int | None:
    """A number of units; None for all of them."""
    return None if text in (None, "all") else _numbers(name, str(text), int)[0]


def _numbers(name: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Numbers between commas.

    Raises:
        DyditError: If they are none.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        whole = "whole numbers" if kind is int else "numbers"
        raise DyditError(
            f"--{name} {text} cannot be read.",
            why=f"It takes {whole}, with commas between several.",
            fix=f"Write --{name} {'1,4' if kind is int else '0.5,0.7'}, say.",
        ) from error
