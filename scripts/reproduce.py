"""Train and measure what docs/protocol.md lays down, and write the results: python scripts/reproduce.py --data FOLDER

    FOLDER: the four original IDX files of Fashion-MNIST (60,000 training images, 10,000 test images).

    python scripts/reproduce.py --list                          every cell, its state and its price
    python scripts/reproduce.py --quick                         ten minutes on two cores, packaged data: shows that all of it works
    python scripts/reproduce.py --data F --only 'dit-*-0.5-*'   some cells
    python scripts/reproduce.py --data F --group core           what the hypotheses need
    python scripts/reproduce.py --data F --group remedy         what is tried where they are missed or undecided
    python scripts/reproduce.py --data F --group remedy --settle  the remedy that won for each row, against the test reference
    python scripts/reproduce.py --data F --publish              writes docs/results.md and docs/results.json out of what has run
    python scripts/reproduce.py --data F --restore              takes what is published as run: on another machine, go on from there
    python scripts/reproduce.py --data F --models               trains restored cells once more, so that they can be timed

Every cell runs by the project's own commands (`dydit convert`, `finetune`, `evaluate`) and is kept under a hash of everything that its
result depends on: what has run is not run again, what was stopped goes on. The report is written anew after every cell.

The same command, started several times, shares the work: each process takes cells that no other has. One process a core, with one
thread each (OMP_NUM_THREADS=1), wastes least. Times are measured last, by one process, when nothing else runs here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dydit_cli.cli.chatter import hush

hush()

import numpy as np

from dydit_cli.artifacts import atomic_write, write_json
from dydit_cli.artifacts.manifest import file_hash
from dydit_cli.checkpoints.builtin import PREFIX, builtin_models
from dydit_cli.data.idx import read_idx
from dydit_cli.data.opening import PACKAGED
from scripts.reproduction.book import TIMING, Book
from scripts.reproduction.cells import (
    CONTROL,
    FULL,
    QUICK,
    SAMPLERS,
    Cell,
    Circumstances,
    all_cells,
    quick_cells,
)
from scripts.reproduction.claims import Claims
from scripts.reproduction.remedies import HYPOTHESES
from scripts.reproduction.report import read_results, write_report
from scripts.reproduction.restoring import restore
from scripts.reproduction.running import REPOSITORY, Missing, Planned, Runner, hashes
from scripts.reproduction.timing import Subject, time_beside
from scripts.reproduction.working import POLL_SECONDS, Worker, done, minutes, price_of
from scripts.reproduction.working import TIMING as TIMING_CLAIM

PACKAGED_NAME = "fashion-mnist-subset"
TIMED_GROUPS = ("core", "extended", "remedied")


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
        "--group", action="append", choices=("choice", "core", "extended", "remedy"), help="cells of a group"
    )
    parser.add_argument(
        "--remedies",
        metavar="NAMES",
        help=f"remedies of these hypotheses ({', '.join(HYPOTHESES)}) instead of those that were missed or undecided",
    )
    parser.add_argument(
        "--settle",
        action="store_true",
        help="no more remedies will be tried: choose the best of each row, which runs against the test reference",
    )
    parser.add_argument("--list", action="store_true", help="list cells, their states and prices, and end")
    parser.add_argument(
        "--recipe-rates",
        action="store_true",
        help="the recipes' learning rates, where there is no time to choose them",
    )
    timing = parser.add_mutually_exclusive_group()
    timing.add_argument("--no-timing", action="store_true", help="measure no time an image")
    timing.add_argument("--timing", action="store_true", help="measure times an image, and run nothing else")
    ending = parser.add_mutually_exclusive_group()
    ending.add_argument(
        "--publish", action="store_true", help="write docs/results.* out of what has run, and end"
    )
    ending.add_argument(
        "--restore", action="store_true", help="take the cells of docs/results.json as run, and end"
    )
    ending.add_argument(
        "--models", action="store_true", help="train restored cells that are asked for once more, and end"
    )
    return parser.parse_args(arguments)


def base_of(family: str, given: str | None, quick: bool) -> str:
    """The checkpoint that all arms of a family start from: the longer trained one, where it is shipped."""
    if given:
        return given if given.startswith(PREFIX) else str(Path(given).resolve())
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
    folder = PACKAGED.get(data, Path(data))
    held = "".join(file_hash(file) for file in sorted(folder.glob("t10k-*-ubyte*")))
    file = out / f"validation-{sha256(held.encode()).hexdigest()[:8]}.npz"
    if not file.exists():
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
    if options.restore:
        return _restore(out)
    book = Book(runner, cells, options)
    if options.settle:
        book.settle(_say)
    if options.list:
        _list(runner, book)
        return 0
    if options.publish:
        if options.quick:
            print("error: a quick run is no evidence and is not published", file=sys.stderr)
            return 2
        return _publish(book)
    claims, failed = Claims(out / "claims"), False
    if options.models:
        return _train_again(runner, claims, book.wanted())
    if not options.timing:
        after = partial(_report, book, out, options.quick)
        failed = Worker(runner, claims, book.wanted, _say, after).work()
    if not options.no_timing:
        _time(runner, claims, book.wanted(), quick=options.quick)
    _report(book, out, options.quick)
    return int(failed)


def _say(text: str) -> None:
    print(text, flush=True)


def _restore(out: Path) -> int:
    """Take what is published as run."""
    written, held = restore(read_results(REPOSITORY / "docs" / "results.json"), out)
    _say(f"  {len(written)} cells of docs/results.json are taken as run, {len(held)} were there already")
    return 0


def _train_again(runner: Runner, claims: Claims, wanted: Sequence[Cell]) -> int:
    """Make the models of restored cells that would be timed; the exit code is 1 if one failed."""
    failed = 0
    for cell in wanted:
        planned = done(runner, cell)
        if planned is None or not _is_timed(planned) or planned.has_model:
            continue
        with claims.taken(planned.folder.name) as claim:
            if claim is None or planned.has_model:
                continue
            _say(f"{cell.name}: trained once more")
            try:
                loss = runner.train(planned, claim.includes)
            except subprocess.CalledProcessError as error:
                failed = 1
                _say(f"  failed with exit code {error.returncode}; the same command goes on where it stopped")
                continue
            published = (planned.result or {}).get("held_out_loss")
            if loss is not None and published is not None:
                _say(f"  {cell.name}: held-out loss {loss:.7f}, of the restored result {published:.7f}")
    return failed


def _time(runner: Runner, claims: Claims, wanted: Sequence[Cell], *, quick: bool) -> None:
    """Time the first seed of every row beside the control of its family, when nothing else runs here."""
    # Controls first: the execution that is faster for them is theirs beside all others.
    ordered = sorted(wanted, key=lambda cell: cell.arm != CONTROL)
    pending = [pair for cell in ordered if (pair := _pending(runner, cell)) is not None]
    if not pending:
        return
    with claims.taken(TIMING_CLAIM) as claim:
        if claim is None:
            _say("times are measured by another process")
            return
        if others := _others(claims):
            _say(f"times are measured when {', '.join(others)} has ended")
        while _others(claims):
            time.sleep(POLL_SECONDS)
        # Another process may have measured some before this one had its turn.
        pending = [pair for planned, _ in pending if (pair := _pending(runner, planned.cell)) is not None]
        started = time.monotonic()
        for number, (planned, control) in enumerate(pending):
            cell = planned.cell
            sampling = {
                "sampler": SAMPLERS[cell.family],
                "steps": runner.around.sizes.sampler_steps,
                "guidance": 1.0,
            }
            left = (time.monotonic() - started) / number * (len(pending) - number) if number else None
            rest = "" if left is None else f"; all times that are left: {minutes(left)}"
            _say(f"[{number + 1}/{len(pending)}] timing {cell.name} beside {control.cell.name}{rest}")
            found = time_beside(
                _subject(planned),
                _control_subject(control),
                sampling,
                **({"pairs": 3, "batch": 16} if quick else {}),
            )
            write_json(planned.folder / TIMING, asdict(found))


def _others(claims: Claims) -> list[str]:
    """Cells that run."""
    return [name for name in claims.held() if name != TIMING_CLAIM]


def _pending(runner: Runner, cell: Cell) -> tuple[Planned, Planned] | None:
    """A cell that is to be timed, and the control beside it; None if it is not, or was."""
    planned, control = done(runner, cell), done(runner, _control(cell))
    if planned is None or control is None or not _is_timed(planned) or _timing(planned) is not None:
        return None
    if without := [each.cell.name for each in (planned, control) if not each.has_model]:
        names = " and ".join(without)
        _say(
            f"{cell.name} is not timed: no model of {names} is here, as after --restore (--models trains it)"
        )
        return None
    return planned, control


def _is_timed(planned: Planned) -> bool:
    """Whether a cell is one of those that are timed: the first seed of a row."""
    return planned.cell.group in TIMED_GROUPS and planned.cell.seed == 0


def _control(cell: Cell) -> Cell:
    rate = cell.rate
    return Cell(cell.family, CONTROL, 1.0, 0, "core", rate)


def _subject(planned: Planned) -> Subject:
    return Subject(planned.model, ("static", "compact") if planned.cell.is_static else ("compact",))


def _control_subject(planned: Planned) -> Subject:
    """The control as others are timed beside it: in the execution that was faster when it was timed itself."""
    timing = _timing(planned)
    return _subject(planned) if timing is None else Subject(planned.model, (timing["execution"],))


def _timing(planned: Planned) -> dict[str, Any] | None:
    """The timing of a cell; None if it has none, or one of before the control's execution was kept."""
    file = planned.folder / TIMING
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found if "control_execution" in found else None


def _list(runner: Runner, book: Book) -> None:
    wanted = book.wanted()
    for cell in wanted:
        try:
            planned = runner.plan(cell)
        except Missing as reason:
            print(f"{cell.group:9} {cell.name:52} waits: {reason}")
            continue
        if planned.result is not None:
            state = f"done: Fréchet distance {planned.result['fd']:.3f}"
        else:
            state = ("begun, " if planned.folder.exists() else "") + minutes(runner.price(planned))
        print(f"{cell.group:9} {cell.name:52} {state}")
    print(f"all that is left: {minutes(price_of(runner, wanted))}")


def _publish(book: Book) -> int:
    """Write the page out of what has run, unless nothing has, or what has belongs to other settings."""
    strangers, found = book.strangers(), book.published()
    if not found["circumstances"]["cells_done"]:
        rest = f", and {len(strangers)} of other settings, such as {strangers[0]}" if strangers else ""
        print(
            f"error: {book.runner.out} has no finished cell of these settings{rest}.\n"
            "  fix: give the same --data, --dit, --sit and --recipe-rates as the runs that made them.",
            file=sys.stderr,
        )
        return 2
    for name in strangers:
        print(f"note: {name} is left out: it ran with other settings, bases, data or another version")
    for file in write_report(found, REPOSITORY / "docs", quick=False):
        _say(f"  written: {file}")
    return 0


def _report(book: Book, folder: Path, quick: bool) -> None:
    for file in write_report(book.published(), folder, quick=quick):
        _say(f"  written: {file}") if folder != book.runner.out else None


if __name__ == "__main__":
    raise SystemExit(main())
