"""Runs that are killed outright at a chosen moment, and resumed: real processes and real SIGKILLs.

``python -m tests.training.killing FOLDER`` trains one run straight, and one for each moment, which is killed there and resumed by
another process. Every run is a fork of one process that has imported everything and computed nothing, so that all of them together
take seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dydit_cli.artifacts import leftovers, manifest
from dydit_cli.training import bookkeeping, checkpoint, fine_tune, prepare, run_folder, stepping
from tests.training.runs import settings_for

# The package has a function of the same name.
writing = import_module("dydit_cli.artifacts.writing")
STEP = 4
"""Whose checkpoint is being written, or which is being trained, when the kill comes."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(
    owner: Any, name: str, when: Callable[..., bool], first: Callable[..., None] | None = None
) -> None:
    """Let the process die before a call for which ``when`` holds, after ``first`` was done."""
    whole = getattr(owner, name)

    def deadly(*arguments: Any, **named: Any) -> Any:
        if when(*arguments, **named):
            if first is not None:
                first(*arguments, **named)
            kill()
        return whole(*arguments, **named)

    setattr(owner, name, deadly)


def in_the_middle_of_a_step() -> None:
    before(stepping, "_check_finite", lambda *a: next(checks) == 2 * STEP)


checks = iter(range(10_000))


def while_metrics_are_written() -> None:
    def half(self: run_folder.RunFolder, report: Any) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "lo')

    before(run_folder.RunFolder, "log", lambda self, report: report.step == STEP, half)


def while_tensors_are_written() -> None:
    before(
        checkpoint,
        "save_file",
        lambda tensors, path: path.name == "ema.safetensors" and f"step_{STEP:07d}" in str(path),
        lambda tensors, path: path.write_bytes(b"half a file"),
    )


def before_a_checkpoint_takes_its_place() -> None:
    before(writing, "_replace", lambda temporary, out: out.name == f"step_{STEP:07d}")


def before_older_checkpoints_go() -> None:
    before(checkpoint, "remove_folder", lambda path: True)


def while_an_older_checkpoint_goes() -> None:
    before(
        leftovers.shutil,
        "rmtree",
        lambda path, **named: any(Path(path).rglob("model.safetensors")),
        lambda path, **named: next(Path(path).rglob("state.json")).unlink(),
    )


def while_the_final_weights_take_their_place() -> None:
    before(run_folder.os, "replace", lambda source, target: Path(target).name == "config.json")


def before_the_last_manifest_takes_its_place() -> None:
    before(
        manifest,
        "write_json",
        lambda path, content: bool(content.get("results", {}).get("completed")),
        lambda path, content: writing.temporary_file(Path(path)).write_text('{"half'),
    )


def while_a_sample_is_drawn() -> None:
    before(bookkeeping.Measuring, "held_out", lambda self, done, images: done == STEP)


def with_workers() -> None:
    before(bookkeeping.Bookkeeping, "after", lambda self, report, on_sample, last: report.step == STEP)


MOMENTS: dict[str, tuple[Callable[[], None], dict[str, Any]]] = {
    "in the middle of a step": (in_the_middle_of_a_step, {}),
    "while metrics are written": (while_metrics_are_written, {}),
    "while tensors are written": (while_tensors_are_written, {}),
    "before a checkpoint takes its place": (before_a_checkpoint_takes_its_place, {}),
    "before older checkpoints go": (before_older_checkpoints_go, {}),
    "while an older checkpoint goes": (while_an_older_checkpoint_goes, {}),
    "while the final weights take their place": (while_the_final_weights_take_their_place, {}),
    "before the last manifest takes its place": (before_the_last_manifest_takes_its_place, {}),
    "during an evaluation": (while_a_sample_is_drawn, {}),
    "with two workers": (with_workers, {"num_workers": 2}),
}
"""What is armed, and what else is set."""


def in_a_fork(act: Callable[[], object]) -> int:
    """Run ``act`` in a process of its own; return the number of the signal that ended it, or 0."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    if os.WEXITSTATUS(status):
        raise SystemExit("a run failed")
    return 0


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    straight = folder / "straight"
    straight.mkdir()
    in_a_fork(lambda: fine_tune(settings_for(straight, feedback=True, keep_checkpoints=1)))
    for name, (arm, more) in MOMENTS.items():
        place = folder / name.replace(" ", "_")
        place.mkdir()

        def start(place: Path = place, arm: Callable[[], None] = arm, more: dict[str, Any] = more) -> None:
            settings = settings_for(place, feedback=True, keep_checkpoints=1, **more)
            arm()
            fine_tune(settings)

        def resume(place: Path = place, more: dict[str, Any] = more) -> None:
            run = prepare(settings_for(place, feedback=True, keep_checkpoints=1, resume=True, **more))
            (place / "told").write_text("\n".join(run.warnings))
            for _ in run.steps():
                pass
            run.finish()

        if in_a_fork(start) != signal.SIGKILL:
            raise SystemExit(f"the run was not killed: {name}")
        (place / "left").write_text("\n".join(str(path.relative_to(place)) for path in place.rglob(".*")))
        in_a_fork(resume)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
