"""One picture a seed on one device: torch's deterministic kernels, switched on for a while and then as they were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACE = ":4096:8"


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Let torch use deterministic kernels only, and restore the process's settings at the end.

    On CUDA, cuBLAS needs a workspace of fixed size for that, which an environment variable asks for, and cuDNN must not choose
    a kernel by timing. Operations without a deterministic kernel raise. What is set holds for all threads of the process.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    workspace = os.environ.get(CUBLAS_WORKSPACE)
    os.environ.setdefault(CUBLAS_WORKSPACE, FIXED_WORKSPACE)
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop(CUBLAS_WORKSPACE, None)
