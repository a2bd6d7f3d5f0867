"""The protocol's cells, verdicts and report, on made-up results; and, slowly, the real thing at a tiny size."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.reproduction import timing
from scripts.reproduction import verdicts as judged
from scripts.reproduction.cells import (
    CHOICE_SEED,
    FULL,
    QUICK,
    SEEDS,
    Cell,
    Circumstances,
    all_cells,
    choices,
    core,
    key_of,
    overrides,
    quick_cells,
)
from scripts.reproduction.report import NOT_MEASURED, read_results, results_of, write_report
from scripts.reproduction.running import Missing, Runner
from scripts.reproduction.timing import _order_interval

AROUND = Circumstances(
    {"dit": "builtin:dit_fmnist", "sit": "builtin:sit_fmnist"},
    "fashion-mnist-subset",
    FULL,
    {"network": "n" * 64},
)


def result(
    arm: str, ratio: float, fd: float, seed: int = 0, family: str = "dit", **changes: Any
) -> dict[str, Any]:
    """What a finished cell leaves, made up."""
    return {
        "name": f"{family}-{arm}-{ratio:g}-seed{seed}",
        "family": family,
        "arm": arm,
        "lambda": ratio,
        "seed": seed,
        "group": "core",
        "variant": "",
        "learning_rate": 3e-4,
        "fd": fd,
        "fd_sampling_std": 0.02,
        "held_out_loss": 0.04 - 0.01 * ratio,
        "metrics": {
            name: {"value": 0.5} for name in ("spatial_frechet", "kernel", "precision", "recall", "accuracy")
        },
        "ratio": ratio,
        "trajectory_ratio": ratio,
        "gmacs": 0.08328 * ratio,
        "parameters": 1_900_000,
        "seconds_per_image": 0.01 * ratio,
        "time_ratio": ratio,
        "commands": ["dydit convert x", "dydit evaluate x"],
    } | changes


def table_of(*cells: dict[str, Any]) -> dict[judged.RowKey, judged.Row]:
    rows: dict[judged.RowKey, list[dict[str, Any]]] = {}
    for cell in cells:
        rows.setdefault((cell["family"], cell["arm"], cell["lambda"], cell["variant"]), []).append(cell)
    return judged.table_of(rows)


def by_name(found: list[judged.Verdict]) -> dict[str, judged.Verdict]:
    return {each.name: each for each in found}


def test_the_core_is_what_the_protocol_lists(repository: Path) -> None:
    rows = [cell.row for cell in core()]
    for arm in ("dynamic", "pruned-random", "pruned-magnitude", "pruned-taylor"):
        assert rows.count(("dit", arm, 0.5, "")) == len(SEEDS) == 3
        assert ("sit", arm, 0.5, "") in rows
        assert all(("dit", arm, ratio, "") in rows for ratio in (0.7, 0.3))
    assert rows.count(("dit", "static-control", 1.0, "")) == 3
    assert {arm for _, arm, _, _ in rows} >= {"lora", "td-lora", "ordered", "budgets", "base"}
    names = [cell.name for cell in all_cells()]
    assert len(set(names)) == len(names)
    assert {cell.seed for cell in choices()} == {CHOICE_SEED}
    assert CHOICE_SEED not in {cell.seed for cell in all_cells() if cell.group != "choice"}
    facts = json.loads((repository / "dydit_cli/assets/evaluation/evaluation.json").read_text())
    page = (repository / "docs/protocol.md").read_text(encoding="utf-8")
    assert facts["weights"]["sha256"] in page
    assert facts["statistics"]["sha256"] in page


def test_every_cell_resolves_to_a_recipe(tmp_path: Path) -> None:
    from dydit_cli.recipe.loading import load_recipe

    for cell in (*all_cells(), *quick_cells()):
        sizes = QUICK if cell in quick_cells() else FULL
        around = Circumstances(AROUND.bases, AROUND.data, sizes)
        recipe = load_recipe(
            f"baselines/{'static-control' if cell.arm == 'base' else cell.arm}",
            overrides(cell, around, 1e-4, 0.5 if "pruned" in cell.arm else None),
        )
        training = recipe.sections["finetune"].model_dump()
        assert training["target_ratio"] == (1 if cell.is_static else cell.ratio)
        assert training["seed"] == cell.seed
        assert recipe.sections["evaluate"].model_dump()["guidance"] == 1


def test_a_key_changes_with_what_the_result_depends_on_and_with_nothing_else() -> None:
    cell = Cell("dit", "dynamic", 0.5, 0)
    changed = overrides(cell, AROUND, 1e-4, None)
    key = key_of(cell, AROUND, changed, {"finetune": {"steps": 1500}}, "0.1.0")
    assert key == key_of(cell, AROUND, list(changed), {"finetune": {"steps": 1500}}, "0.1.0")
    others = [
        key_of(cell, AROUND, overrides(cell, AROUND, 3e-4, None), {"finetune": {"steps": 1500}}, "0.1.0"),
        key_of(cell, AROUND, changed, {"finetune": {"steps": 1501}}, "0.1.0"),
        key_of(cell, AROUND, changed, {"finetune": {"steps": 1500}}, "0.2.0"),
        key_of(
            cell,
            Circumstances(AROUND.bases, AROUND.data, FULL, {"network": "m"}),
            changed,
            {"finetune": {"steps": 1500}},
            "0.1.0",
        ),
    ]
    assert len({key, *others}) == 5

    def with_hashes(**bases: str) -> str:
        around = Circumstances(AROUND.bases, AROUND.data, FULL, {"network": "n" * 64, **bases})
        return key_of(cell, around, changed, {"finetune": {"steps": 1500}}, "0.1.0")

    assert with_hashes(base_dit="a", base_sit="b") == with_hashes(base_dit="a", base_sit="c")
    assert with_hashes(base_dit="a", base_sit="b") != with_hashes(base_dit="b", base_sit="b")


def test_a_cell_waits_for_what_it_depends_on(tmp_path: Path) -> None:
    runner = Runner(tmp_path, AROUND, all_cells(), tmp_path / "v.npz", lambda text: None, chooses=True)
    with pytest.raises(Missing, match="learning rate is chosen"):
        runner.plan(Cell("dit", "dynamic", 0.5, 0))
    for number, cell in enumerate(
        cell for cell in choices() if (cell.family, cell.arm) == ("dit", "dynamic")
    ):
        planned = runner.plan(cell)
        planned.folder.mkdir(parents=True)
        held = {"learning_rate": cell.rate, "fd": [3.0, 2.0, 2.5][number]}
        (planned.folder / "cell.json").write_text(json.dumps(held))
    planned = runner.plan(Cell("dit", "dynamic", 0.5, 0))
    assert planned.rate == 3e-4
    assert "learning_rate=0.0003" in planned.command("finetune")
    assert f"evaluate.reference={tmp_path / 'v.npz'}" not in planned.changed
    with pytest.raises(Missing, match="pruned to the MACs"):
        Runner(tmp_path, AROUND, quick_cells(), None, lambda text: None, chooses=False).plan(quick_cells()[2])


@pytest.mark.parametrize(
    ("dynamic", "outcome"),
    [((1.00, 1.01, 0.99), "held"), ((1.30, 1.31, 1.29), "missed"), ((1.09, 1.12, 1.10), "undecided")],
)
def test_verdicts_go_by_the_whole_interval(dynamic: tuple[float, ...], outcome: str) -> None:
    cells = [result("dynamic", 0.5, fd, seed) for seed, fd in enumerate(dynamic)]
    cells += [result("static-control", 1.0, fd, seed) for seed, fd in enumerate((1.0, 1.01, 0.99))]
    found = by_name(judged.verdicts(table_of(*cells)))
    assert found["H1"].outcome == outcome
    assert found["H1"].ratio is not None
    ratio, low, high = found["H1"].ratio
    assert low < ratio < high
    assert found["H2"].outcome == found["H3"].outcome == found["H4"].outcome == NOT_MEASURED


def test_the_best_pruning_is_chosen_in_its_favour() -> None:
    cells = [result("dynamic", 0.5, fd, seed) for seed, fd in enumerate((1.0, 1.01, 0.99))]
    cells += [result("pruned-random", 0.5, fd, seed, gmacs=0.0418) for seed, fd in enumerate((3.0, 3.1, 2.9))]
    cells += [result("pruned-taylor", 0.5, fd, seed) for seed, fd in enumerate((1.7, 1.69, 1.71))]
    table = table_of(*cells)
    best = judged.best_pruning(table, "dit", 0.5)
    assert best is not None
    assert best[0] == "pruned-taylor"
    found = by_name(judged.verdicts(table))
    assert found["H2"].outcome == "held"
    assert found["equal cost"].outcome == "held"
    dearer = table_of(*cells, result("pruned-magnitude", 0.5, 2.0, gmacs=0.0425))
    assert by_name(judged.verdicts(dearer))["equal cost"].outcome == "missed"


@pytest.mark.parametrize(
    ("pruned", "outcome"),
    [((1.7, 1.72, 1.68), "held"), ((1.2, 1.22, 1.18), "missed"), ((1.5, 1.55, 1.45), "undecided")],
)
def test_at_least_goes_by_the_whole_interval(pruned: tuple[float, ...], outcome: str) -> None:
    cells = [result("dynamic", 0.5, fd, seed) for seed, fd in enumerate((1.0, 1.01, 0.99))]
    cells += [result("pruned-taylor", 0.5, fd, seed) for seed, fd in enumerate(pruned)]
    assert by_name(judged.verdicts(table_of(*cells)))["H2"].outcome == outcome


def test_a_family_of_one_seed_borrows_the_spread_of_the_other() -> None:
    cells = [result("static-control", 1.0, fd, seed) for seed, fd in enumerate((1.0, 1.05, 0.95))]
    cells += [result("dynamic", 0.5, 1.0, family="sit"), result("static-control", 1.0, 1.0, family="sit")]
    found = by_name(judged.verdicts(table_of(*cells), "sit"))["H1"]
    assert found.outcome == "undecided"
    assert "given the spread of the others" in found.text
    # Both rows of one seed are given one estimate, of 2 degrees of freedom; what sampling alone does (0.02) is no part of it.
    assert found.ratio is not None
    assert found.ratio[2] == pytest.approx(math.exp(4.303 * math.sqrt(2) * 0.05))
    assert [each.name for each in judged.verdicts(table_of(*cells), "sit")] == ["H1", "H2", "equal cost"]


def test_two_rows_of_one_seed_decide_nothing_where_no_spread_is_known() -> None:
    table = table_of(result("dynamic", 0.5, 9.0), result("static-control", 1.0, 1.0))
    found = by_name(judged.verdicts(table))["H1"]
    assert (found.outcome, found.ratio) == ("undecided", None)
    assert "spread is not known" in found.text


def test_the_degrees_of_freedom_follow_the_larger_variance() -> None:
    above = table_of(*(result("dynamic", 0.5, fd, seed) for seed, fd in enumerate((1.0, 1.1, 0.9))))
    below = table_of(*(result("static-control", 1.0, 1.0 + seed / 1e6, seed) for seed in range(3)))
    compared = judged.compare(*above.values(), *below.values(), None)
    assert compared is not None
    # Nearly all of the variance is that of one row, with 2 degrees of freedom.
    assert compared.high / compared.ratio == pytest.approx(math.exp(4.303 * math.sqrt(0.1**2 / 3)), rel=1e-4)


def test_no_verdict_rests_on_cells_that_have_not_run() -> None:
    planned = {
        ("dit", "dynamic", 0.5, ""): 3,
        ("dit", "static-control", 1.0, ""): 3,
        **{("dit", arm, 0.5, ""): 1 for arm in ("pruned-random", "pruned-taylor")},
    }
    cells = [result("dynamic", 0.5, fd, seed) for seed, fd in enumerate((9.0, 9.1, 9.2))]
    cells += [result("static-control", 1.0, fd, seed) for seed, fd in enumerate((1.0, 1.01))]
    cells.append(result("pruned-taylor", 0.5, 10.0))
    found = by_name(judged.verdicts(table_of(*cells), "dit", planned))
    assert [found[name].outcome for name in ("H1", "H2", "equal cost")] == [NOT_MEASURED] * 3
    assert found["H1"].text.endswith("to come: static-control (2 of 3 seeds)")
    assert "pruned-random 0.5 (not run)" in found["H2"].text
    assert found["H1"].ratio is not None
    cells += [result("static-control", 1.0, 0.99, 2), result("pruned-random", 0.5, 11.0)]
    found = by_name(judged.verdicts(table_of(*cells), "dit", planned))
    assert [found[name].outcome for name in ("H1", "H2", "equal cost")] == ["missed", "missed", "held"]


def test_remedied_rows_change_no_verdict() -> None:
    planned = {("dit", arm, 0.5, ""): 1 for arm in ("dynamic", "pruned-taylor")}
    planned |= {("dit", arm, 0.5, "remedied-x"): 1 for arm in ("dynamic", "pruned-taylor")}
    cells = [result("dynamic", 0.5, fd, seed) for seed, fd in enumerate((1.0, 1.01, 0.99))]
    cells += [result("pruned-taylor", 0.5, fd, seed) for seed, fd in enumerate((1.7, 1.69, 1.71))]
    before = judged.verdicts(table_of(*cells), "dit", planned)
    assert [each.outcome for each in before if each.name in ("H2", "equal cost")] == ["held", "held"]
    treated = [result(arm, 0.5, 0.5, variant="remedied-x") for arm in ("dynamic", "pruned-taylor")]
    after = by_name(judged.verdicts(table_of(*cells, *treated), "dit", planned))
    assert after["H2"] == by_name(before)["H2"]
    # What they cost is compared as well.
    assert "of 2 rows" in after["equal cost"].text
    treated[1]["gmacs"] *= 1.02
    assert "+2.00% (pruned-taylor 0.5, remedied-x)" in "".join(
        each.text for each in judged.verdicts(table_of(*cells, *treated), "dit", planned)
    )


def test_cells_that_ran_other_code_are_told_of() -> None:
    from scripts.reproduction.report import _code

    assert _code({}) == []
    assert "same code (hash abc" in _code({"abc": 3})[2]
    assert "2 states" in _code({"abc": 3, "def": 1})[2]


def test_a_row_of_one_seed_is_given_the_spread_of_the_others() -> None:
    cells = [result("static-control", 1.0, fd, seed) for seed, fd in enumerate((1.0, 1.2, 0.8))]
    table = table_of(*cells, result("dynamic", 0.3, 1.1))
    found = by_name(judged.verdicts(table))["H3"]
    assert found.outcome == "undecided"
    assert "given the spread of the others" in found.text
    spread = judged.pooled_spread(table)
    assert spread == judged.Spread(pytest.approx(0.2), 2)
    compared = judged.compare(
        table["dit", "dynamic", 0.3, ""], table["dit", "static-control", 1.0, ""], spread
    )
    # Variances of the logarithms add: one seed against three, by Welch with (1 + 1/3)^2 / (1/2 + 1/18) = 3.2 degrees of freedom.
    half = 3.182 * math.sqrt(0.2**2 + 0.2**2 / 3)
    assert compared is not None
    assert (compared.low, compared.high) == pytest.approx((1.1 * math.exp(-half), 1.1 * math.exp(half)))


def test_the_report_is_made_of_the_results_alone(tmp_path: Path) -> None:
    cells = [result("dynamic", 0.5, fd, seed) for seed, fd in enumerate((1.0, 1.1, 1.05))]
    cells += [result("static-control", 1.0, 0.98), result("sit-base", 1.0, 2.0, family="sit")]
    cells += [result("pruned-taylor", 0.5, 1.2, held_out_loss=0.036)]
    expected = {
        ("dit", "dynamic", 0.5, ""): 3,
        ("dit", "pruned-taylor", 0.5, ""): 3,
        ("dit", "td-lora", 0.5, ""): 1,
        ("dit", "static-control", 1.0, ""): 3,
    }
    around = {
        "images": 5000,
        "sampler_steps": 25,
        "reference_images": 60000,
        "hashes": {"network": "a" * 64},
        "learning_rates": "chosen on the validation split",
        "devices": {"cpu": 4},
        "versions": ["torch 2"],
        "bases": {"dit": "builtin:dit_fmnist", "sit": "builtin:sit_fmnist_long"},
        "cells_done": 4,
        "cells_all": 9,
    }
    results = results_of(
        cells, expected, around, {"dit dynamic": {"rate": 3e-4, "distances": {"0.0003": 1.0}}}
    )
    files = write_report(results, tmp_path, quick=False)
    assert [file.name for file in files] == [
        "results.json",
        "results.md",
        "results_macs.png",
        "results_time.png",
        "results_loss.png",
    ]
    read = read_results(tmp_path / "results.json")
    assert list(read["headline"]) == [
        "dynamic_0.5",
        "dynamic_0.3",
        "static_control",
        "best_static_pruning_0.5",
        "td_lora_0.5",
    ]
    headline = read["headline"]["dynamic_0.5"]
    assert headline["fd"] == pytest.approx(1.05)
    assert headline["fd_std"] == pytest.approx(0.05)
    assert headline["gmacs"] == pytest.approx(0.04164)
    assert headline["seconds_per_image"] == pytest.approx(0.005)
    assert read["headline"]["static_control"]["fd_std"] == 0.02
    assert read["headline"]["td_lora_0.5"] == dict.fromkeys(("fd", "fd_std", "gmacs", "seconds_per_image"))
    assert all(
        list(row) == ["fd", "fd_std", "gmacs", "seconds_per_image"] for row in read["headline"].values()
    )
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| dynamic | 0.5 | 1.050 ± 0.050 | 3 | 0.03500 | 41.64 |" in text
    assert "- DiT, λ 0.5: dynamic +16.7%, pruned by Taylor +20.0%" in text
    assert "| static control |  | 0.980 ± 0.020 | 1 of 3 |" in text
    assert text.index("| static control |") < text.index("| dynamic | 0.5") < text.index("| dynamic, TD-LoRA")
    assert "DiT: every row starts from `builtin:dit_fmnist`, which was not trained until" in text
    assert "SiT: every row" not in text
    assert "on cpu with torch 2" in text
    assert "chosen on the validation split: 0.0003" in text
    assert "| dynamic, TD-LoRA | 0.5 | not measured |" in text
    assert "evidence of nothing" not in text
    again = tmp_path / "again"
    write_report(read, again, quick=True)
    assert "evidence of nothing" in (again / "results.md").read_text(encoding="utf-8")
    assert (again / "results.json").read_text() == (tmp_path / "results.json").read_text()


def test_seconds_are_paired_ratios_times_those_of_the_control() -> None:
    from scripts.reproduction.book import add_times

    timed = {"seconds_per_image": 0.02, "time_ratio": 0.9}
    cells = [
        {"family": "dit", "arm": "static-control", "timing": timed},
        {"family": "dit", "arm": "dynamic", "timing": {"seconds_per_image": 0.5, "time_ratio": 0.6}},
        {"family": "dit", "arm": "ordered"},
        {"family": "sit", "arm": "dynamic", "timing": timed},
    ]
    add_times(cells)
    assert [cell.get("time_ratio") for cell in cells] == [1.0, 0.6, None, None]
    assert cells[1]["seconds_per_image"] == pytest.approx(0.012)


def test_the_faster_execution_is_chosen_by_all_rounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Seconds by execution and round; the first round, by chance, says otherwise of both.
    seconds = {
        ("own", "static"): [1.0, 3.0, 3.0],
        ("own", "compact"): [9.0, 2.0, 2.2],
        ("control", "static"): [2.0, 9.0, 9.0],
        ("control", "compact"): [5.0, 4.0, 4.0],
    }
    order = []

    def sampler(subject: timing.Subject, execution: str, *_: object) -> Any:
        return subject.folder.name, execution

    def taken(run: Any) -> float:
        order.append(run)
        return seconds[run].pop(0)

    monkeypatch.setattr(timing, "_sampler", sampler)
    monkeypatch.setattr(timing, "_seconds", taken)
    both = ("static", "compact")
    own, control = (timing.Subject(tmp_path / name, both) for name in ("own", "control"))
    found = timing.time_beside(own, control, {}, pairs=3, batch=2)
    assert (found.execution, found.control_execution) == ("compact", "compact")
    assert found.time_ratio == pytest.approx(2.2 / 4)
    assert found.seconds_per_image == pytest.approx(1.1)
    # All run in every round, and the order turns.
    assert order[4:8] == order[3::-1] == order[11:7:-1]


def test_the_interval_of_a_median() -> None:
    assert _order_interval(list(range(9))) == (1, 7)
    assert _order_interval(list(range(6))) == (0, 5)
    assert _order_interval([4.0]) == (4.0, 4.0)


def test_what_is_asked_wrongly_is_explained(repository: Path) -> None:
    script = [sys.executable, str(repository / "scripts" / "reproduce.py")]
    found = subprocess.run(script, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "--data FOLDER is needed" in found.stderr


@pytest.mark.slow
def test_a_tiny_run_from_beginning_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts import reproduce
    from scripts.reproduction.cells import Sizes

    schedule = ("finetune.full_width_steps=0", "finetune.ramp_steps=1", "finetune.router_learning_rate=0.4")
    tiny = Sizes(steps=6, images=20, sampler_steps=2, schedule=(*schedule, "finetune.batch_size=8"))
    monkeypatch.setattr(reproduce, "QUICK", tiny)
    arguments = [
        "--quick",
        "--out",
        str(tmp_path),
        "--only",
        "dit-dynamic-*",
        "--only",
        "dit-static-*",
        "--only",
        "dit-pruned-random-*",
    ]
    assert reproduce.main(arguments) == 0
    read = read_results(tmp_path / "results.json")
    rows = {row["arm"]: row for row in read["rows"]}
    assert rows["dynamic"]["fd"] > 0
    assert rows["dynamic"]["time_ratio"] > 0
    assert rows["pruned-magnitude"]["state"] == NOT_MEASURED
    assert rows["pruned-random"]["gmacs"] == pytest.approx(rows["dynamic"]["gmacs"], rel=0.01)
    (cell,) = (tmp_path / "cells").glob("dit-dynamic-*")
    before = (cell / "cell.json").stat().st_mtime_ns
    assert reproduce.main(arguments) == 0
    assert (cell / "cell.json").stat().st_mtime_ns == before
    assert not (cell / "trained" / "checkpoints").exists()
