"""Every random draw is a function of (seed, keys) alone, so that nothing needs to remember a generator's state.

A training step asks for ``normal(seed, shape, "noise", step, index)`` and gets the same numbers whatever the batch size, the number
of workers or of processes, and whether the run was resumed: the step number is the whole state.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """Return a CPU generator that depends on ``seed`` and ``keys`` alone.

    The keys are hashed rather than added, so that (seed 0, index 1) and (seed 1, index 0) are unrelated streams.
    """
    text = "\x1f".join([str(int(seed)), *(str(key) for key in keys)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # torch takes seeds of 64 bits; the sign bit is dropped because manual_seed refuses the most negative value.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(seed: int, shape: tuple[int, ...], *keys: int | str) -> Tensor:
    """Standard normal numbers of ``shape``, fp32 on the CPU, from the stream named by ``keys``."""
    return torch.randn(shape, generator=generator(seed, *keys))


def uniform(seed: int, shape: tuple[int, ...], *keys: int | str) -> Tensor:
    """Uniform numbers in [0, 1) of ``shape``, fp32 on the CPU, from the stream named by ``keys``."""
    return torch.rand(shape, generator=generator(seed, *keys))
