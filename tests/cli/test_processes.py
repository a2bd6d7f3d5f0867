"""`dydit finetune --processes 2` as a person runs it: Ctrl-C, a process that is killed, and a launcher of another size."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dydit_cli.cli.app import main
from tests.training.runs import settings_for

pytestmark = pytest.mark.slow
PATIENCE_S = 600


def words(folder: Path, *more: str) -> list[str]:
    settings = settings_for(folder)
    return [
        "finetune",
        *("--model", settings.model, "--data", settings.data, "--out", str(folder / "t"), "--device", "cpu"),
        *("batch_size=8", "log_every=1", "evaluate_every=0", "checkpoint_every=2"),
        *more,
    ]


def started(arguments: list[str], repository: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dydit_cli", *arguments],
        env=os.environ | {"PYTHONPATH": str(repository)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.2)


def children(process: subprocess.Popen[str]) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in found.split()]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in (folder / "t" / "checkpoints").glob("step_*/state.json"))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads the processes of Linux")
def test_a_killed_process_ends_the_run_and_a_stopped_run_is_kept(tmp_path: Path, repository: Path) -> None:
    run = started(words(tmp_path, "steps=100000", "--processes", "2"), repository)
    wait_for(lambda: bool(checkpoints(tmp_path)), run)
    os.kill(children(run)[-1], signal.SIGKILL)
    said, told = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 2
    assert said == ""
    assert "was killed (SIGKILL), so the others were stopped." in told
    assert "Traceback" not in told
    kept = checkpoints(tmp_path)

    again = started(["finetune", str(tmp_path / "t" / "recipe.yaml"), "--resume"], repository)
    wait_for(lambda: checkpoints(tmp_path) != kept, again)
    again.send_signal(signal.SIGINT)
    _, told = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 130
    assert told.count("a checkpoint was written") == 1
    assert told.count("interrupted.") == 1
    assert "Traceback" not in told


def test_a_launcher_of_another_size_is_refused(tmp_path: Path, repository: Path) -> None:
    run = started(words(tmp_path, "steps=2", "processes=4"), repository, RANK="0", WORLD_SIZE="2")
    said, told = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 2
    assert said == ""
    assert "asks for 4 processes, and 2 were started" in told
    assert not (tmp_path / "t").exists()


def test_a_finished_run_says_what_one_process_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words(tmp_path, "steps=2", "calibrate=false", "--processes", "2")) == 0
    captured = capfd.readouterr()
    assert captured.out.count("Written to") == 1
    assert "next: dydit profile" in captured.err
    assert (tmp_path / "t" / "config.json").is_file()
