"""What accelerate does for a run: autocast, gradient scaling, backward, and the gradients of several processes (DDP)."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from dydit_cli.errors import DyditError
from dydit_cli.processes.world import World


def make_accelerator(device: torch.device, mixed_precision: str, world: World) -> Accelerator:
    """Make the accelerator of one run.

    Args:
        device: Of this process.
        mixed_precision: Type of autocast.
        world: The processes of the run, which have met already.

    Raises:
        DyditError: for fp16 on a CPU.
    """
    if mixed_precision == "fp16" and device.type == "cpu":
        raise DyditError(
            "Mixed precision fp16 does not work on a CPU.",
            why="Gradients in half precision need a GPU's loss scaling.",
            fix="Set mixed_precision to no, or to bf16 where the CPU has it.",
        )
    # accelerate keeps one state a process and refuses a second run with another device or precision in the
    # same one.
    if PartialState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=True)
    # Placement is ours: accelerate knows one device a process and could not honour cuda:1.
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=mixed_precision,
        device_placement=False,
    )
    if accelerator.num_processes != world.size:
        raise RuntimeError(
            f"accelerate sees {accelerator.num_processes} processes, and there are {world.size}"
        )
    return accelerator
