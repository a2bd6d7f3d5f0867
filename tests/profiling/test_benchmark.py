"""The benchmark script still runs, and what it runs is right. How fast that is, is not a matter for tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("masks", ["scattered", "prefix"])
def test_one_round_of_the_benchmark(repository: Path, masks: str) -> None:
    script = repository / "scripts" / "bench_compact.py"
    options = ["--batch", "1", "--blocks", "1", "--pairs", "1", "--masks", masks, "--json"]
    finished = subprocess.run(
        [sys.executable, str(script), *options], check=True, capture_output=True, text=True, timeout=120
    )
    result = json.loads(finished.stdout)
    # 8 of 16 heads, 11 of 16 groups, 70 % of tokens; adaLN and routers included.
    assert result["ideal"] == pytest.approx(0.494, abs=1e-3)
    assert result["difference_to_dense"] < 1e-5
    assert result["ratio"] > 0
