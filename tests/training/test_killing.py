"""Kill -9 at any moment, then ``--resume``: bit for bit the run that nobody killed, and nothing half-written stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dydit_cli.artifacts import leftovers
from dydit_cli.cli.app import main
from dydit_cli.errors import DyditError
from dydit_cli.training import checkpoint, prepare
from tests.training.killing import MOMENTS
from tests.training.runs import metrics_of, settings_for
from tests.training.test_finetuning import run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes")

LEAVES_SOMETHING = {
    "while tensors are written",
    "before a checkpoint takes its place",
    "while an older checkpoint goes",
    "while the final weights take their place",
    "before the last manifest takes its place",
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A straight run, and one a moment that was killed there and resumed."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "tests.training.killing", str(folder)],
        cwd=repository,
        env=environment,
        check=True,
        timeout=300,
    )
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("straight")
    run(settings_for(folder))
    return folder


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run folder by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == 4, "one checkpoint of three files, and the final weights"
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_with_the_same_bits(killed: Path, moment: str) -> None:
    place, straight = killed / moment.replace(" ", "_"), killed / "straight"
    expected, found = contents(straight / "t"), contents(place / "t")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert metrics_of(straight / "t") == metrics_of(place / "t")
    assert json.loads((place / "t" / "manifest.json").read_text())["results"]["completed"] is True


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_a_killed_run_left_is_cleared_and_told(killed: Path, moment: str) -> None:
    place = killed / moment.replace(" ", "_")
    assert bool((place / "left").read_text()) == (moment in LEAVES_SOMETHING)
    assert list(place.rglob(".*")) == []
    assert ("A killed process had left" in (place / "told").read_text()) == (moment in LEAVES_SOMETHING)


def test_a_damaged_checkpoint_is_passed_over(straight: Path, tmp_path: Path) -> None:
    damaged = tmp_path
    run(settings_for(damaged), stop_after=4)
    newest = damaged / "t" / "checkpoints" / "step_0000004"
    (newest / "ema.safetensors").write_bytes((newest / "ema.safetensors").read_bytes()[:1000])
    resumed = run(settings_for(damaged, resume=True))
    assert f"{newest} cannot be read" in resumed.warnings[0]
    assert "goes on from step 2" in resumed.warnings[0]
    assert metrics_of(straight / "t") == metrics_of(damaged / "t")
    for folder in (straight, damaged):
        assert [entry.step for entry in checkpoint.checkpoints(folder / "t")] == [4, 6]
    for file in ("model", "ema", "optimizer"):
        paths = [
            folder / "t/checkpoints/step_0000006" / f"{file}.safetensors" for folder in (straight, damaged)
        ]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_checkpoints_that_are_all_damaged_are_an_error(tmp_path: Path) -> None:
    run(settings_for(tmp_path), stop_after=4)
    for entry in checkpoint.checkpoints(tmp_path / "t"):
        (entry.path / "model.safetensors").unlink()
    with pytest.raises(DyditError, match=r"step_0000004 cannot be read") as caught:
        prepare(settings_for(tmp_path, resume=True))
    assert "--overwrite" in caught.value.fix
    for entry in checkpoint.checkpoints(tmp_path / "t"):
        (entry.path / "state.json").write_text('{"ste')
    with pytest.raises(DyditError, match="no checkpoint to resume from") as caught:
        prepare(settings_for(tmp_path, resume=True))
    assert "damaged" in caught.value.why


def test_a_run_shorter_than_its_cadence_still_logs_its_end(tmp_path: Path) -> None:
    run(settings_for(tmp_path, steps=3, log_every=10))
    (line,) = metrics_of(tmp_path / "t")
    assert line["step"] == 3
    assert line["realised_ratio"] is not None


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(straight: Path, tmp_path: Path) -> None:
    started = prepare(settings_for(tmp_path, checkpoint_every=0))
    for report in started.steps():
        if report.step == 2:
            break
    resumed = run(settings_for(tmp_path, resume=True))
    assert "begins again" in resumed.warnings[0]
    assert metrics_of(straight / "t") == metrics_of(tmp_path / "t")


class TestLeftovers:
    def test_a_living_process_keeps_what_it_writes(self, tmp_path: Path) -> None:
        mine = leftovers.temporary_folder(tmp_path / "c")
        assert leftovers.clear_leftovers(tmp_path) == []
        assert mine.is_dir()

    def test_only_what_a_dead_process_of_this_machine_left_goes(self, tmp_path: Path) -> None:
        mine = leftovers.temporary_file(tmp_path / "c.json").name
        machine, _, start = leftovers.process_name().split("-")
        names = {
            "elsewhere": mine.replace(machine, "00000000" if machine != "00000000" else "11111111"),
            "reborn": mine.replace(f"-{start}", "-1"),
            "foreign": ".c.json.part",
            "hidden": ".bashrc",
        }
        for name in names.values():
            (tmp_path / name).write_text("x")
        gone = leftovers.clear_leftovers(tmp_path)
        assert [path.name for path in gone] == [names["reborn"]]

    def test_what_was_about_to_be_replaced_is_put_back(self, tmp_path: Path) -> None:
        dead = leftovers.process_name().rsplit("-", 1)[0] + "-1"
        kept = tmp_path / f".run.{dead}-abc.old" / "old"
        kept.mkdir(parents=True)
        (kept / "precious").write_text("x")
        assert tmp_path / "run" in leftovers.clear_leftovers(tmp_path, "run")
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert (tmp_path / "run" / "precious").read_text() == "x"


@pytest.mark.slow
def test_the_command_killed_again_and_again(tmp_path: Path, repository: Path) -> None:
    """Kills at arbitrary moments, during a checkpoint among them, as soon as its temporary folder shows."""
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    words = [
        "steps=40",
        "batch_size=8",
        "checkpoint_every=2",
        "num_workers=2",
        "target_ratio=0.6",
        "device=cpu",
    ]
    words += ["log_every=1", "evaluate_every=5", "full_width_steps=5", "ramp_steps=20", "ema_decay=0.9"]
    for folder in (stopped, straight):
        folder.mkdir()
        settings_for(folder)

    def command(folder: Path, *more: str) -> list[str]:
        places = [f"model={folder / 'c-dit'}", f"data={folder / 'data.npz'}", f"out={folder / 't'}"]
        return ["finetune", *places, *words, *more]

    kills = 0
    for attempt in range(6):
        resume = ["resume=true"] if (stopped / "t").exists() else []
        process = subprocess.Popen(
            [sys.executable, "-m", "dydit_cli", *command(stopped, *resume)],
            cwd=repository,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        seen: set[str] = set()
        while process.poll() is None and len(seen) <= attempt % 3:
            seen |= {path.name for path in (stopped / "t" / "checkpoints").glob(".*.part")}
            time.sleep(0.0005)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills > 2
    if not (stopped / "t" / "config.json").exists():
        assert main(command(stopped, "resume=true")) == 0
    assert main(command(straight)) == 0
    assert metrics_of(stopped / "t") == metrics_of(straight / "t")
    assert contents_of_final(stopped) == contents_of_final(straight)
    assert [path for path in stopped.rglob(".*") if path.name.endswith((".part", ".old"))] == []


def contents_of_final(folder: Path) -> bytes:
    (file,) = (folder / "t").glob("*.safetensors")
    return file.read_bytes()


@pytest.mark.slow
def test_two_processes_killed_together(tmp_path: Path, repository: Path) -> None:
    """The launcher and both of its processes at once, while a checkpoint is being written."""
    words = [
        "steps=12",
        "batch_size=8",
        "checkpoint_every=2",
        "num_workers=1",
        "target_ratio=0.6",
        "device=cpu",
    ]
    words += ["log_every=1", "evaluate_every=4", "full_width_steps=2", "ramp_steps=4", "processes=2"]

    def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
        places = [f"model={folder / 'c-dit'}", f"data={folder / 'data.npz'}", f"out={folder / 't'}"]
        return subprocess.Popen(
            [sys.executable, "-m", "dydit_cli", "finetune", *places, *words, *more],
            cwd=repository,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    folders = [tmp_path / name for name in ("stopped", "straight")]
    for folder in folders:
        folder.mkdir()
        settings_for(folder)
    straight, stopped = start(folders[1]), start(folders[0])
    seen: set[str] = set()
    while stopped.poll() is None and len(seen) < 2:
        seen |= {path.name for path in (folders[0] / "t" / "checkpoints").glob(".*.part")}
        time.sleep(0.001)
    os.killpg(stopped.pid, signal.SIGKILL)
    stopped.wait()
    assert not (folders[0] / "t" / "config.json").exists()
    assert straight.wait(timeout=600) == 0
    assert start(folders[0], "resume=true").wait(timeout=600) == 0
    assert metrics_of(folders[0] / "t") == metrics_of(folders[1] / "t")
    assert contents_of_final(folders[0]) == contents_of_final(folders[1])
