"""A FLUX of full width is converted tensor by tensor, in a process that never owns much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LARGEST_GB = 1.0
"""Of a file of 1.09 GB at full width, whatever its depth: torch's libraries (0.25), the largest tensor in fp32 twice (0.45)."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_full_width(tmp_path: Path, repository: Path) -> None:
    def run(script: str, *arguments: str) -> None:
        command = [sys.executable, str(repository / "scripts" / script), *arguments]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=1200)

    source, figures = tmp_path / "flux.safetensors", tmp_path / "figures.json"
    run("make_sparse_flux.py", str(source), "--depth", "1", "--single-depth", "1")
    arguments = (
        "--out",
        str(tmp_path / "out"),
        "--max-shard-size",
        "300MB",
        "--verify",
        "--json",
        str(figures),
    )
    run("measure_streaming.py", str(source), *arguments)
    measured = json.loads(figures.read_text(encoding="utf-8"))
    assert measured["numbers"] == 545_548_096
    assert measured["files"] > 1
    assert measured["largest_difference"] == 0.0
    assert measured["rss_anon_peak_with_verification_gb"] < LARGEST_GB
    assert not (tmp_path / "out").exists()
