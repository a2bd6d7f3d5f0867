"""Train and measure what docs/protocol.md lays down, and write the results: python scripts/reproduce.py --data FOLDER

    FOLDER: the four original IDX files of Fashion-MNIST (60,000 training images, 10,000 test images).

    python scripts/reproduce.py --list                          every cell, its state and its price
    python scripts/reproduce.py --quick                         ten minutes on two cores, packaged data: shows that all of it works
    python scripts/reproduce.py --data F --only 'dit-*-0.5-*'   some cells
    python scripts/reproduce.py --data F --group core           what the hypotheses need
    python scripts/reproduce.py --data F --publish              writes docs/results.md and docs/results.json out of what has run

Every cell runs by the project's own commands (`dydit convert`, `finetune`, `evaluate`) and is kept under a hash of everything that its
result depends on: what has run is not run again, what was stopped goes on. The report is written anew after every cell.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from dydit_cli.artifacts import atomic_write, write_json
from dydit_cli.artifacts.manifest import device_description
from dydit_cli.checkpoints.builtin import builtin_models
from dydit_cli.data.idx import read_idx
from dydit_cli.data.opening import PACKAGED
from scripts.reproduction.cells import (
    BASE,
    CONTROL,
    FULL,
    QUICK,
    SAMPLERS,
    Cell,
    Circumstances,
    all_cells,
    quick_cells,
)
from scripts.reproduction.report import results_of, write_report
from scripts.reproduction.running import REPOSITORY, Missing, Planned, Runner, hashes
from scripts.reproduction.timing import Subject, time_beside

REFERENCE_IMAGES = 60_000
PACKAGED_NAME = "fashion-mnist-subset"
TIMING = "timing.json"
TIMED_GROUPS = ("core", "extended")


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of the four IDX files")
    parser.add_argument(
        "--out", type=Path, help="where cells are kept (runs/reproduce, or runs/reproduce-quick)"
    )
    parser.add_argument("--dit", help="base checkpoint of DiT, a file or builtin:NAME")
    parser.add_argument("--sit", help="base checkpoint of SiT, a file or builtin:NAME")
    parser.add_argument("--quick", action="store_true", help="few steps, samples and cells; no evidence")
    parser.add_argument(
        "--only", metavar="PATTERN", action="append", help="cells whose names match, such as 'dit-*-seed0'"
    )
    parser.add_argument(
        "--group", action="append", choices=("choice", "core", "extended"), help="cells of a group"
    )
    parser.add_argument("--list", action="store_true", help="list cells, their states and prices, and end")
    parser.add_argument(
        "--recipe-rates",
        action="store_true",
        help="the recipes' learning rates, where there is no time to choose them",
    )
    parser.add_argument("--no-timing", action="store_true", help="measure no time an image")
    parser.add_argument(
        "--publish", action="store_true", help="write docs/results.* out of what has run, and end"
    )
    return parser.parse_args(arguments)


def base_of(family: str, given: str | None, quick: bool) -> str:
    """The checkpoint that all arms of a family start from: the longer trained one, where it is shipped."""
    if given:
        return given
    longer = f"{family}_fmnist_long"
    if not quick and longer in builtin_models():
        return f"builtin:{longer}"
    if not quick:
        print(
            f"note: builtin:{longer} is not shipped yet (scripts/train_base_models.py makes it); builtin:{family}_fmnist "
            "stopped after some 5,500 steps, so that mere further training flatters every arm.",
            file=sys.stderr,
        )
    return f"builtin:{family}_fmnist"


def validation_archive(data: str, out: Path) -> Path:
    """The test images of the data as an archive: what choices are measured against, and nothing else."""
    file = out / "validation.npz"
    if not file.exists():
        folder = PACKAGED.get(data, Path(data))
        parts = {}
        for name, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
            found = sorted(folder.glob(f"t10k-{name}-ubyte*"))
            if not found:
                raise SystemExit(
                    f"error: {folder} has no t10k-{name}-ubyte file, on which learning rates are chosen"
                )
            parts[name] = read_idx(found[0], dimensions)
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, arr_0=parts["images-idx3"][..., None], arr_1=parts["labels-idx1"])
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cells and write the report; the exit code is 1 if a cell failed."""
    options = options_of(arguments)
    data = options.data or (PACKAGED_NAME if options.quick else None)
    if data is None:
        print(
            "error: --data FOLDER is needed (the four IDX files of Fashion-MNIST), or --quick",
            file=sys.stderr,
        )
        return 2
    data = data if data in PACKAGED else str(Path(data).resolve())
    out = (options.out or Path("runs/reproduce-quick" if options.quick else "runs/reproduce")).resolve()
    cells = quick_cells() if options.quick else all_cells()
    bases = {family: base_of(family, getattr(options, family), options.quick) for family in ("dit", "sit")}
    around = Circumstances(
        bases, data, QUICK if options.quick else FULL, hashes(bases, PACKAGED.get(data, Path(data)))
    )
    validation = None if options.quick else validation_archive(data, out)
    chooses = not (options.quick or options.recipe_rates)
    runner = Runner(out, around, cells, validation, _say, chooses=chooses)
    wanted = [cell for cell in cells if _wanted(cell, options)]
    if options.list:
        _list(runner, wanted)
        return 0
    if not options.publish:
        failed = _run(runner, cells, wanted, options)
        _report(runner, cells, out, options.quick)
        return int(failed)
    if options.quick:
        print("error: a quick run is no evidence and is not published", file=sys.stderr)
        return 2
    _report(runner, cells, REPOSITORY / "docs", quick=False)
    return 0


def _wanted(cell: Cell, options: argparse.Namespace) -> bool:
    named = not options.only or any(fnmatch(cell.name, pattern) for pattern in options.only)
    return named and (not options.group or cell.group in options.group)


def _say(text: str) -> None:
    print(text, flush=True)


def _run(runner: Runner, cells: Sequence[Cell], wanted: Sequence[Cell], options: argparse.Namespace) -> bool:
    failed = False
    for number, cell in enumerate(wanted, 1):
        try:
            planned = runner.plan(cell)
        except Missing as reason:
            _say(f"[{number}/{len(wanted)}] {cell.name}: waits, {reason}")
            continue
        if planned.result is not None:
            continue
        left = _price_of(runner, wanted[number - 1 :])
        _say(
            f"[{number}/{len(wanted)}] {cell.name}: {_minutes(runner.price(planned))}; all that is left: {_minutes(left)}"
        )
        started = time.monotonic()
        try:
            result = runner.run(planned)
        except subprocess.CalledProcessError as error:
            failed = True
            _say(f"  failed with exit code {error.returncode}; the same command goes on where it stopped")
            continue
        _say(
            f"  Fréchet distance {result['fd']:.3f}, {result['gmacs'] * 1e3:.2f} MMACs, {_minutes(time.monotonic() - started)}"
        )
        _report(runner, cells, runner.out, options.quick)
    if not options.no_timing:
        _time(runner, wanted, quick=options.quick)
    return failed


def _time(runner: Runner, wanted: Sequence[Cell], *, quick: bool) -> None:
    """Time the first seed of every row beside the control of its family."""
    for cell in wanted:
        if cell.group not in TIMED_GROUPS or cell.seed != 0:
            continue
        planned, control = _done(runner, cell), _done(runner, _control(cell))
        if planned is None or control is None or (planned.folder / TIMING).exists():
            continue
        sampling = {
            "sampler": SAMPLERS[cell.family],
            "steps": runner.around.sizes.sampler_steps,
            "guidance": 1.0,
        }
        _say(f"timing {cell.name} beside {control.cell.name}")
        found = time_beside(
            _subject(planned), _subject(control), sampling, **({"pairs": 3, "batch": 16} if quick else {})
        )
        write_json(planned.folder / TIMING, asdict(found))


def _control(cell: Cell) -> Cell:
    rate = cell.rate
    return Cell(cell.family, CONTROL, 1.0, 0, "core", rate)


def _done(runner: Runner, cell: Cell) -> Planned | None:
    try:
        planned = runner.plan(cell)
    except Missing:
        return None
    return planned if planned.result is not None else None


def _subject(planned: Planned) -> Subject:
    folder = planned.folder / ("converted" if planned.cell.arm == BASE else "trained")
    return Subject(folder, ("static", "compact") if planned.cell.is_static else ("compact",))


def _price_of(runner: Runner, cells: Sequence[Cell]) -> float | None:
    """What is left of ``cells``; those that wait for others cost as much as the dearest that do not."""
    known, waiting = [], 0
    for cell in cells:
        try:
            planned = runner.plan(cell)
        except Missing:
            waiting += 1
            continue
        if planned.result is None:
            known.append(runner.price(planned))
    prices = [price for price in known if price is not None]
    return sum(prices) + waiting * max(prices) if prices else None


def _minutes(seconds: float | None) -> str:
    return "price not known before the first cell" if seconds is None else f"about {seconds / 60:.1f} min"


def _list(runner: Runner, cells: Sequence[Cell]) -> None:
    for cell in cells:
        try:
            planned = runner.plan(cell)
        except Missing as reason:
            print(f"{cell.group:9} {cell.name:44} waits: {reason}")
            continue
        if planned.result is not None:
            state = f"done: Fréchet distance {planned.result['fd']:.3f}"
        else:
            state = ("begun, " if planned.folder.exists() else "") + _minutes(runner.price(planned))
        print(f"{cell.group:9} {cell.name:44} {state}")
    print(f"all that is left: {_minutes(_price_of(runner, cells))}")


def _report(runner: Runner, cells: Sequence[Cell], folder: Path, quick: bool) -> None:
    found: list[dict[str, Any]] = []
    choices: dict[str, Any] = {}
    for cell in cells:
        planned = _done(runner, cell)
        if planned is None or planned.result is None:
            continue
        timing = planned.folder / TIMING
        held = dict(planned.result)
        if timing.exists():
            held["timing"] = _read_json(timing)
        found.append(held)
        if cell.group == "choice" and (chosen := runner.chosen(cell.family, cell.kind)):
            distances = {str(rate): value for rate, value in chosen[1].items()}
            choices[f"{cell.family} {cell.kind}"] = {"rate": chosen[0], "distances": distances}
    _add_times(found)
    rows = list(dict.fromkeys(cell.row for cell in cells if cell.group != "choice"))
    sizes = runner.around.sizes
    circumstances = {
        "quick": quick,
        "images": sizes.images,
        "sampler_steps": sizes.sampler_steps,
        "reference_images": REFERENCE_IMAGES,
        "hashes": dict(runner.around.hashes),
        "bases": dict(runner.around.bases),
        "learning_rates": "chosen on the validation split"
        if runner.chooses
        else "the recipes' own, not chosen",
        "device": device_description("cpu"),
        "cells_done": len(found),
        "cells_all": len(cells),
    }
    for file in write_report(results_of(found, rows, circumstances, choices), folder, quick=quick):
        _say(f"  written: {file}") if folder != runner.out else None


def _add_times(cells: Sequence[dict[str, Any]]) -> None:
    """Give each timed cell its ratio to the control's time, and that times the control's seconds.

    Rows are timed one after the other, and what else the machine does moves their seconds; their ratios were paired.
    """
    controls = {
        cell["family"]: cell["timing"]["seconds_per_image"]
        for cell in cells
        if cell["arm"] == CONTROL and "timing" in cell
    }
    for cell in cells:
        if "timing" in cell and cell["family"] in controls:
            ratio = 1.0 if cell["arm"] == CONTROL else cell["timing"]["time_ratio"]
            cell |= {"time_ratio": ratio, "seconds_per_image": ratio * controls[cell["family"]]}


def _read_json(file: Path) -> dict[str, Any]:
    import json

    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    raise SystemExit(main())
