"""Published results back into the folder that cells are kept in: on another machine, what was published need not run again.

Only results come back. A cell whose model is wanted as well, to time it, is trained once more (`Runner.train`), and not measured again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dydit_cli.artifacts import write_json
from scripts.reproduction.book import SETTLED, TIMING, row_name
from scripts.reproduction.remedies import SUBJECTS
from scripts.reproduction.remedy_report import OPEN
from scripts.reproduction.running import RESULT, cell_folder

DERIVED = ("timing", "time_ratio", "seconds_per_image")
"""What publishing adds to a cell's result: its timing, and what comes of that."""


def restore(results: Mapping[str, Any], out: Path) -> tuple[list[str], list[str]]:
    """Write published cells, their times and the remedies that were settled into a folder; what it has already stays.

    Args:
        results: Of ``docs/results.json``.
        out: The folder.

    Returns:
        The names of cells that were written, and of those that the folder had.
    """
    written, held = [], []
    for cell in results["cells"]:
        folder = cell_folder(out, cell["name"], cell["key"])
        if (folder / RESULT).exists():
            held.append(cell["name"])
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RESULT, {name: value for name, value in cell.items() if name not in DERIVED})
            written.append(cell["name"])
        if "timing" in cell and not (folder / TIMING).exists():
            write_json(folder / TIMING, cell["timing"])
    if not (out / SETTLED).exists():
        rows = {row_name(subject): subject for subject in SUBJECTS}
        settled = {
            name: outcome["settled"]
            for name, subject in rows.items()
            for outcome in results["remedies"]
            if (outcome["family"], outcome["arm"], outcome["lambda"])
            == (subject.family, subject.arm, subject.ratio)
            and outcome["settled"] != OPEN
        }
        write_json(out / SETTLED, settled)
    return list(dict.fromkeys(written)), list(dict.fromkeys(held))
