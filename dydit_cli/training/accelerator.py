"""What accelerate does for a run: autocast, gradient scaling and backward."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from dydit_cli.errors import DyditError


def make_accelerator(device: torch.device, mixed_precision: str) -> Accelerator:
    """Make the accelerator of one run.

    Raises:
        DyditError: for fp16 on a CPU, and for more than one process.
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
        cpu=device.type == "cpu", mixed_precision=mixed_precision, device_placement=False
    )
    if accelerator.num_processes != 1:
        raise DyditError(
            f"Fine-tuning runs in one process, not in {accelerator.num_processes}.",
            why="The command was started by a launcher of several processes, which would all write the "
            "same folder.",
            fix="Start `dydit finetune` by itself.",
        )
    return accelerator
