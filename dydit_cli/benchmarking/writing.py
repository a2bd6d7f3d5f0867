"""Write a benchmark: its JSON, its picture, and a manifest that says how they came about."""

from __future__ import annotations

from pathlib import Path

import torch

from dydit_cli.artifacts import artifact_folder, write_json, write_manifest
from dydit_cli.benchmarking.plots import write_plot
from dydit_cli.benchmarking.report import BenchReport
from dydit_cli.benchmarking.service import ServiceReport


def write_bench(
    out: str | Path,
    report: BenchReport | ServiceReport,
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
) -> list[str]:
    """Write ``bench.json`` and ``bench.png``, or ``service.json``, into a folder.

    Returns:
        Names of the files, the manifest left out.

    Raises:
        DyditError: If ``out`` exists already, or the disk refuses.
    """
    name = "bench" if isinstance(report, BenchReport) else "service"
    content = report.to_json()
    files = [f"{name}.json"]
    with artifact_folder(out, overwrite=overwrite) as folder:
        write_json(folder / files[0], content)
        if isinstance(report, BenchReport):
            write_plot(folder / "bench.png", report)
            files.append("bench.png")
        write_manifest(
            folder,
            stage="bench",
            settings=report.settings,
            parent=report.settings["model"],
            results={"rows": content["rows"]},
            device=device,
        )
    return files
