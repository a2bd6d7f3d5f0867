"""Several processes on one folder of cells: nobody runs what another has, and what a dead one held is free."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dydit_cli.artifacts import write_json
from dydit_cli.artifacts.leftovers import process_name
from scripts.reproduction import claims as claiming
from scripts.reproduction.cells import FULL, Cell, Circumstances, all_cells, core
from scripts.reproduction.claims import Claims
from scripts.reproduction.running import Planned, Runner, code_hash
from scripts.reproduction.working import TIMING, Worker

AROUND = Circumstances(
    {"dit": "builtin:dit_fmnist", "sit": "builtin:sit_fmnist"}, "fashion-mnist-subset", FULL, {}
)


def dead_process() -> str:
    """The name of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        name = process_name(process.pid)
        process.communicate(b"\n")
    return name


def test_a_name_is_held_once(tmp_path: Path) -> None:
    mine, theirs = Claims(tmp_path), Claims(tmp_path)
    with mine.taken("cell") as first, theirs.taken("cell") as second, theirs.taken("other") as other:
        assert first is not None
        assert second is None
        assert other is not None
        assert mine.held() == ["cell", "other"]
        assert theirs.holds("cell")
    assert mine.held() == []
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_process_held_is_free_unless_its_command_runs_on(tmp_path: Path) -> None:
    gone = dead_process()
    (tmp_path / "cell.json").write_text(json.dumps({"process": gone, "since": "then"}))
    with Claims(tmp_path).taken("cell") as claim:
        assert claim is not None
        assert json.loads((tmp_path / "cell.json").read_text())["process"] == process_name()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        (tmp_path / "cell.json").write_text(
            json.dumps({"process": gone, "since": "then", "command": process_name(running.pid)})
        )
        with Claims(tmp_path).taken("cell") as claim:
            assert claim is None
        running.communicate(b"\n")
    with Claims(tmp_path).taken("cell") as claim:
        assert claim is not None
        claim.includes(1)
        assert set(json.loads((tmp_path / "cell.json").read_text())) == {"process", "since", "command"}


def test_a_claim_that_came_between_is_put_back(tmp_path: Path) -> None:
    file, stale, live = tmp_path / "cell.json", {"process": "dead"}, {"process": process_name()}
    file.write_text(json.dumps(live))
    claiming._remove_stale(file, stale)
    assert json.loads(file.read_text()) == live
    claiming._remove_stale(file, live)
    assert not file.exists()
    claiming._remove_stale(file, live)


def worker(
    out: Path,
    cells: list[Cell],
    run: Callable[[Planned], None],
    said: list[str],
    after: Callable[[], None] = lambda: None,
) -> Worker:
    runner = Runner(out, AROUND, all_cells(), None, said.append, chooses=False)

    def pretended(planned: Planned, on_process: Callable[[int], None]) -> dict[str, Any]:
        run(planned)
        result = {"fd": 1.0, "gmacs": 0.04, "equal_prune_ratio": 0.5, "learning_rate": 3e-4}
        planned.folder.mkdir(parents=True, exist_ok=True)
        # As the runner leaves it: another worker may read at any time.
        write_json(planned.folder / "cell.json", result)
        return result

    runner.run = pretended  # type: ignore[method-assign]
    return Worker(runner, Claims(out / "claims"), lambda: cells, said.append, after, poll_seconds=0.02)


def test_two_workers_run_every_cell_once_and_wait_for_each_other(tmp_path: Path) -> None:
    cells = [cell for cell in core() if cell.family == "dit" and cell.arm not in ("lora", "td-lora")]
    ran: list[str] = []
    meet = threading.Barrier(2, timeout=20)

    def run(planned: Planned) -> None:
        ran.append(planned.cell.name)
        if len(ran) <= 2:
            # Both have one at the same time.
            meet.wait()

    said: list[str] = []
    workers = [worker(tmp_path, cells, run, said) for _ in range(2)]
    threads = [threading.Thread(target=each.work) for each in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(ran) == sorted(cell.name for cell in cells)
    assert ran.index("dit-dynamic-0.3-seed0") < ran.index("dit-pruned-taylor-0.3-seed0")
    assert not list((tmp_path / "claims").glob("*.json"))


def test_a_cell_that_fails_is_left_and_the_others_run(tmp_path: Path) -> None:
    cells = list(core())[:3]

    def run(planned: Planned) -> None:
        if planned.cell == cells[1]:
            raise subprocess.CalledProcessError(3, "dydit")

    said: list[str] = []
    own = worker(tmp_path, cells, run, said)
    assert own.work()
    assert own.failed == {cells[1]}
    assert any("exit code 3" in line for line in said)
    assert (own.runner.plan(cells[2]).folder / "cell.json").exists()


def test_nothing_runs_while_times_are_measured(tmp_path: Path) -> None:
    cells, said, ran = list(core())[:1], [], []
    own = worker(tmp_path, cells, lambda planned: ran.append(planned.cell), said)
    with Claims(tmp_path / "claims").taken(TIMING) as timing:
        assert timing is not None
        assert own._once() == ([], [TIMING], False)
    assert not ran
    assert not own.work()
    assert ran == cells


@pytest.mark.parametrize("group", ["dit", "sit"])
def test_a_dynamic_model_comes_before_what_is_pruned_to_it(group: str) -> None:
    order = [cell for cell in core() if cell.family == group]
    for place, cell in enumerate(order):
        if cell.arm.startswith("pruned-"):
            twin = order.index(Cell(cell.family, "dynamic", cell.ratio, 0))
            # A second process has something else to do meanwhile.
            assert place - twin >= 2


def test_the_code_that_ran_is_known() -> None:
    assert code_hash() == code_hash()
    assert len(code_hash()) == 12
