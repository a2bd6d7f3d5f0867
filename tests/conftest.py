"""What every test shares: one thread, no network, no colours, and a working folder of its own.

The variables are set when this file is imported, before any test imports torch, so that they also reach the commands that
tests start. Two test processes with two threads each run at less than half speed on two cores, hence one thread.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "COLUMNS": "200",
    }
)
# These make rich write colour codes whatever NO_COLOR says.
for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "GITHUB_ACTIONS"):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder of its own, so that a forgotten output path never lands in the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent
