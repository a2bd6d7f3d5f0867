"""From what a user writes after ``--device`` to a device that is there."""

from __future__ import annotations

import torch

from dydit_cli.errors import DyditError


def find_device(name: str = "auto") -> torch.device:
    """Return the device called ``name``; ``auto`` takes CUDA, then Apple's mps, then the CPU.

    Raises:
        DyditError: If it is not a device, or not on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DyditError(
            f"'{name}' is not a device.",
            why="Devices are cpu, cuda, cuda:N and mps.",
            fix="Pass one of these, or auto.",
        ) from error
    if device.type == "cpu":
        return device
    present = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(
        device.type, 0
    )
    if (device.index or 0) >= present:
        raise DyditError(
            f"The device '{name}' is not there.",
            why=f"torch {torch.__version__} finds {present} {device.type} device{'' if present == 1 else 's'} on this machine.",
            fix="Pass --device cpu, or install a torch built for the device.",
        )
    return device
