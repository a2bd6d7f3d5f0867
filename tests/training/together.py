"""What two processes do for the tests of distributed training; started as many times as there are ranks, by `start`.

One pair of processes makes all runs that the tests look at: starting one takes longer than all that it does then.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
RATIO_GRADIENT = "ratio_gradient.pt"


def start(
    folder: Path, runs: Mapping[str, Mapping[str, Any]], processes: int
) -> list[subprocess.CompletedProcess[str]]:
    """Make ``runs``, keys of their settings by name, in ``processes`` processes that share a port of this machine.

    Each leaves its folder ``NAME``, unless it says otherwise; the gradient of the ratio alone is left in ``ratio_gradient.pt``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "runs.json").write_text(json.dumps(runs))
    common = os.environ | {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.training.together", str(folder)]
    started = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    ended = []
    for process in started:
        try:
            said, _ = process.communicate(timeout=900)
        finally:
            process.kill()
        ended.append(subprocess.CompletedProcess(command, process.returncode, said))
    return ended


def ratio_gradient(folder: Path, processes: int, **changes: Any) -> dict[str, Tensor]:
    """Gradients of the ratio's loss alone at the first step, by parameter, as the optimiser would see them."""
    from dydit_cli.artifacts import load_for_training
    from dydit_cli.data import TrainingBatches, open_data
    from dydit_cli.processes.world import join
    from dydit_cli.training.parts import assemble
    from dydit_cli.training.sharding import whole
    from dydit_cli.training.step import draw, step_loss
    from tests.training.runs import settings_for

    settings = settings_for(folder, processes=processes, **changes)
    world = join(processes, "cpu")
    device = torch.device("cpu")
    parts = assemble(settings, load_for_training(settings.model, device), device, world)
    data = open_data(settings.data, geometry=parts.model.geometry)
    batches = TrainingBatches(data.train, 8, 0, data.mirror, rank=world.rank, processes=world.size)
    noisy = draw(
        batches.at(0),
        parts.objective,
        parts.model.geometry,
        seed=0,
        step=0,
        label_dropout=0.0,
        device=device,
        reduce_mean=world.mean,
    )

    class Indifferent:
        """An objective under which every prediction is as good."""

        def losses(self, prediction: Tensor, *others: Tensor) -> dict[str, Tensor]:
            return {"loss": 0 * prediction.flatten(1).sum(dim=1)}

    loss = step_loss(
        parts.denoiser,
        Indifferent(),  # type: ignore[arg-type]
        parts.model.geometry,
        noisy,
        dynamic=True,
        complete_branch=False,
        temperature=5.0,
        target=0.3,
        ratio_weight=1.0,
        reduce_mean=world.mean,
    )
    parts.accelerator.backward(loss.total)
    return {
        name: whole(parameter.grad)
        for name, parameter in parts.model.named_parameters()
        if parameter.grad is not None
    }


def main(folder: Path) -> None:
    """Do it all as one of the processes."""
    from dydit_cli.processes.world import leave
    from dydit_cli.training import fine_tune
    from tests.training.runs import settings_for

    torch.set_num_threads(1)
    processes = int(os.environ["WORLD_SIZE"])
    for name, changes in json.loads((folder / "runs.json").read_text()).items():
        fine_tune(settings_for(folder, **({"out": str(folder / name), "processes": processes} | changes)))
    gradients = ratio_gradient(folder, processes)
    if os.environ["RANK"] == "0":
        torch.save(gradients, folder / RATIO_GRADIENT)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
