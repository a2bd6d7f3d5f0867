"""One process at work: take a cell that nobody has, run it, look again. Several can share a folder.

What waits for other cells is looked at again whenever a cell has ended, here or elsewhere; who has nothing to do waits for the others.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from scripts.reproduction.cells import Cell
from scripts.reproduction.claims import Claims
from scripts.reproduction.running import Missing, Planned, Runner, Say

POLL_SECONDS = 15
TIMING = "timing"
"""Name of the claim of who measures times: nothing else runs then."""


@dataclass
class Worker:
    """Runs cells until there is nothing left to do.

    Attributes:
        runner: Knows how.
        claims: Who has what.
        wanted: The cells that are asked for, in their order; asked again after every cell, since remedies come of results.
        say: Told what happens.
        after: Called when a cell has ended well.
        poll_seconds: Between looks at what others do.
        failed: Cells that failed here; they are not tried again.
    """

    runner: Runner
    claims: Claims
    wanted: Callable[[], Sequence[Cell]]
    say: Say
    after: Callable[[], None]
    poll_seconds: float = POLL_SECONDS
    failed: set[Cell] = field(default_factory=set)

    def work(self) -> bool:
        """Run whatever can be run; true if a cell failed."""
        said_to_wait = False
        while True:
            waiting, elsewhere, ran = self._once()
            if ran:
                said_to_wait = False
                continue
            if not elsewhere:
                for cell, reason in waiting:
                    self.say(f"{cell.name}: waits, {reason}")
                return bool(self.failed)
            if not said_to_wait:
                self.say(f"waiting for {', '.join(elsewhere)}, which another process has")
                said_to_wait = True
            time.sleep(self.poll_seconds)

    def _once(self) -> tuple[list[tuple[Cell, Missing]], list[str], bool]:
        """Run the first cell that can be: what waits, what other processes have, and whether one ran."""
        waiting: list[tuple[Cell, Missing]] = []
        elsewhere = [TIMING] if self.claims.holds(TIMING) else []
        for cell in self.wanted():
            if cell in self.failed:
                continue
            try:
                planned = self.runner.plan(cell)
            except Missing as reason:
                waiting.append((cell, reason))
                continue
            if planned.result is not None:
                continue
            if TIMING in elsewhere:
                continue
            with self.claims.taken(planned.folder.name) as claim:
                if claim is None:
                    elsewhere.append(cell.name)
                # Another process may have ended it between the two looks.
                elif planned.result is None:
                    self._run(planned, claim.includes)
                    return waiting, elsewhere, True
        return waiting, elsewhere, False

    def _run(self, planned: Planned, on_process: Callable[[int], None]) -> None:
        cell = planned.cell
        self.say(f"{self._progress()}{cell.name}: {minutes(self.runner.price(planned))}")
        started = time.monotonic()
        try:
            result = self.runner.run(planned, on_process)
        except subprocess.CalledProcessError as error:
            self.failed.add(cell)
            self.say(f"  failed with exit code {error.returncode}; the same command goes on where it stopped")
            return
        self.say(
            f"  {cell.name}: Fréchet distance {result['fd']:.3f}, {result['gmacs'] * 1e3:.2f} MMACs, "
            f"{minutes(time.monotonic() - started)}"
        )
        self.after()

    def _progress(self) -> str:
        cells = self.wanted()
        left, done = price_of(self.runner, cells), sum(is_done(self.runner, cell) for cell in cells)
        processes = len(self.claims.held())
        text = f"[{done} of {len(cells)} done, {minutes(left)} of work left"
        if left is not None and processes > 1:
            text += f" for {processes} processes: {minutes(left / processes)}"
        return f"{text}] "


def is_done(runner: Runner, cell: Cell) -> bool:
    """Whether a cell has run."""
    return done(runner, cell) is not None


def done(runner: Runner, cell: Cell) -> Planned | None:
    """A cell that has run; None if it has not."""
    try:
        planned = runner.plan(cell)
    except Missing:
        return None
    return planned if planned.result is not None else None


def price_of(runner: Runner, cells: Sequence[Cell]) -> float | None:
    """What is left of ``cells``, in seconds; those that wait for others cost as much as the dearest that do not."""
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
    if not known and not waiting:
        return 0.0
    return sum(prices) + waiting * max(prices) if prices else None


def minutes(seconds: float | None) -> str:
    """For people."""
    return "price not known before the first cell" if seconds is None else f"about {seconds / 60:.1f} min"
