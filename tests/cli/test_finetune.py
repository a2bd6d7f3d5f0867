"""`dydit finetune` as a person types it: the artifact, the words, a stop in the middle, and refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from dydit_cli.artifacts import load_model
from dydit_cli.cli.app import main
from dydit_cli.cli.finetune import judgement
from dydit_cli.training import FinetuneResult
from tests.training.runs import metrics_of, settings_for


def words(folder: Path, *more: str, steps: int = 4) -> list[str]:
    """A short run's arguments; model and data are written if they are not there."""
    settings = settings_for(folder)
    return [
        "finetune",
        *("--model", settings.model, "--data", settings.data, "--out", str(folder / "t")),
        *("--steps", str(steps), "--batch-size", "8", "--target-ratio", "0.6", "--device", "cpu"),
        *("log_every=1", "evaluate_every=2", "ramp_steps=2", "full_width_steps=1"),
        *more,
    ]


def test_a_run_from_plain_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tmp_path, "--json", "--sample-every", "2")) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["steps"] == 4
    assert 0 < result["ratio"] < 1
    assert result["target_ratio"] == 0.6
    assert "step 2/4: loss" in captured.err, "a pipe gets a line an evaluation"
    assert load_model(tmp_path / "t").geometry.hidden_size == 32
    assert len(metrics_of(tmp_path / "t")) == 4
    with Image.open(tmp_path / "t" / "samples" / "step_0000004.png") as grid:
        assert grid.size == (42, 42)


def test_the_summary_names_the_next_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tmp_path)) == 0
    captured = capsys.readouterr()
    assert "target 0.6" in captured.out
    assert f"next: dydit profile --model {tmp_path / 't'}" in captured.err
    assert main(words(tmp_path)) == 2
    assert "holds a fine-tuning run already" in capsys.readouterr().err
    assert main(["finetune", str(tmp_path / "t" / "recipe.yaml"), "--resume"]) == 0
    assert "is complete" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_target_that_the_schedule_does_not_reach_is_told_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    # 1 step at full width, 8 from 1 to 0.6: the fourth stands at 2 / 8 of the way.
    assert main(words(tmp_path, *more, "ramp_steps=8", "evaluate_every=0", "calibrate=false")) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "at the last of its 4 steps the target is 0.9000, and no step trains at 0.6" in said
    assert "train more than 9 steps" in said


@pytest.mark.parametrize(
    ("steps", "more", "told"),
    [
        (4, [], False),
        (3, [], True),
        (3, ["target_ratio=1"], False),
        (3, ["routers=random"], False),
        (3, ["budgets=0.6,1"], True),
    ],
)
def test_only_a_run_that_ends_before_its_target_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, more: list[str], told: bool
) -> None:
    arguments = words(tmp_path, "--dry-run", *more, steps=steps)
    if any(word.startswith("target_ratio") for word in more):
        del arguments[arguments.index("--target-ratio") : arguments.index("--target-ratio") + 2]
    assert main(arguments) == 0
    assert ("takes the whole run" in " ".join(capsys.readouterr().err.split())) is told


def test_a_changed_key_on_resume_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tmp_path)) == 0
    assert main(words(tmp_path, "--resume", "label_dropout=0.3")) == 2
    assert "label_dropout 0.1 -> 0.3" in capsys.readouterr().err


def test_mistakes_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = words(tmp_path)
    assert main([*arguments, "target_ratio=0.01"]) == 2
    capsys.readouterr()
    arguments[arguments.index("--target-ratio") + 1] = "0.01"
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "floor" in error
    assert "fix: " in error
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([*words(tmp_path), f"data={empty}"]) == 2
    assert not (tmp_path / "t").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_ctrl_c_writes_a_checkpoint_and_resume_ends_as_if_nothing_had_been(
    tmp_path: Path, repository: Path
) -> None:
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    stopped.mkdir()
    straight.mkdir()
    arguments = words(stopped, "checkpoint_every=0", steps=400)
    process = subprocess.Popen(
        [sys.executable, "-m", "dydit_cli", *arguments],
        cwd=repository,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = stopped / "t" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "a checkpoint was written" in error
    assert "--resume" in error
    assert "Traceback" not in error
    done = metrics_of(stopped / "t")[-1]["step"]
    steps = f"steps={done + 2}"
    assert main(["finetune", str(stopped / "t" / "recipe.yaml"), "--resume", steps]) == 0
    assert main(words(straight, "checkpoint_every=0", steps=done + 2)) == 0
    assert metrics_of(stopped / "t") == metrics_of(straight / "t")


def result_of(ratio: float, target: float) -> FinetuneResult:
    return FinetuneResult(Path("t"), 4, ratio, 0.001, target, 0.5, 0.5, 0.5, 0.1, 1000, 1.0, 10.0)


@pytest.mark.parametrize(
    ("ratio", "target", "word"),
    [
        (0.99, 0.5, "hardly cheaper"),
        (0.6, 0.5, "above its target"),
        (0.4, 0.5, "below"),
        (0.7, 1.0, "frozen"),
    ],
)
def test_disappointing_results_are_explained(ratio: float, target: float, word: str) -> None:
    assert word in judgement(result_of(ratio, target))[0]


def test_good_results_need_no_warning() -> None:
    assert judgement(result_of(0.51, 0.5)) == []
    assert judgement(result_of(1.0, 1.0)) == []
