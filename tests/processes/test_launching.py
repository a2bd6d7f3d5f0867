"""Starting a command in several processes: one voice, whatever goes wrong."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from dydit_cli.cli.app import main
from dydit_cli.processes.failures import read_failure, record_failure
from dydit_cli.processes.launching import outcome_of


def failure(folder: Path, rank: int, exit_code: int, said: dict[str, object] | None = None) -> ProcessFailure:
    """What torch's launcher knows of a process that ended."""
    file = folder / f"{rank}.json"
    if said is not None:
        file.write_text(
            json.dumps({"message": {"message": "", "extraInfo": {"timestamp": "1"}}, "dydit": said})
        )
    return ProcessFailure(local_rank=rank, pid=1000 + rank, exitcode=exit_code, error_file=str(file))


def word(rank: int, what: str, second_hand: bool = False) -> dict[str, object]:
    return {
        "rank": rank,
        "what": what,
        "why": "So.",
        "fix": "Do.",
        "exit_code": 2,
        "second_hand": second_hand,
    }


def test_a_failure_travels_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    record_failure("It broke.", "A reason.", "A cure.", 2, ValueError("x"))
    told = read_failure(json.loads((tmp_path / "error.json").read_text()))
    assert told is not None
    assert (told.rank, told.what, told.why, told.fix, told.exit_code) == (
        1,
        "It broke.",
        "A reason.",
        "A cure.",
        2,
    )
    assert not told.second_hand
    assert read_failure({"message": "<NONE>"}) is None
    lost = record_failure("Lost.", "", "", 1, RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:2"))
    assert lost.second_hand


def test_what_the_first_to_fail_said_is_said(tmp_path: Path) -> None:
    lost = failure(tmp_path, 0, 1, word(0, "Connection closed.", second_hand=True))
    found = outcome_of({0: lost, 1: failure(tmp_path, 1, 2, word(1, "No such file."))}, 2)
    assert found.exit_code == 2
    assert found.failure is not None
    assert found.failure.what == "Process 1 of 2: No such file."
    first = outcome_of({0: failure(tmp_path, 0, 2, word(0, "No such file."))}, 2)
    assert first.failure is not None
    assert first.failure.what == "No such file.", "what the first says is said as of one process"


def test_a_killed_process_is_named(tmp_path: Path) -> None:
    lost = failure(tmp_path, 0, 1, word(0, "Connection closed.", second_hand=True))
    found = outcome_of({0: lost, 1: failure(tmp_path, 1, -signal.SIGKILL)}, 2)
    assert found.failure is not None
    assert found.failure.what == "Process 1 of 2 was killed (SIGKILL), so the others were stopped."
    assert "memory" in found.failure.why
    assert "--resume" in found.failure.fix
    assert found.exit_code == 2


def test_an_exit_code_that_explains_itself_is_passed_on(tmp_path: Path) -> None:
    """As of `evaluate --fail-if`, which has printed why; the others were asked to stop."""
    found = outcome_of({0: failure(tmp_path, 0, 1), 1: failure(tmp_path, 1, -signal.SIGTERM)}, 2)
    assert found.exit_code == 1
    assert found.failure is None


def test_a_mistake_is_said_once_and_leaves_the_environment_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, handler = dict(os.environ), signal.getsignal(signal.SIGINT)
    words = ["sample", "--model", str(tmp_path / "nothing"), "--out", str(tmp_path / "s"), "--processes", "2"]
    assert main(words) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count("why:") == 1
    assert str(tmp_path / "nothing") in said.err
    assert "Traceback" not in said.err
    # The one that every command sets for its own process.
    left = {name for name in os.environ if os.environ[name] != before.get(name)} - {"GOMP_SPINCOUNT"}
    assert not left
    assert signal.getsignal(signal.SIGINT) == handler
    assert not (tmp_path / "s").exists()
