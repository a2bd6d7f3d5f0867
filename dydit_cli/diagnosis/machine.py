"""Devices, threads and compilers, and whether torch can use what the machine has."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dydit_cli.diagnosis.check import Check, Verdict

if TYPE_CHECKING:
    from types import ModuleType

AREA = "machine"
NVIDIA_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl")
COMPILERS = ("c++", "g++", "clang++", "cl")
GIGA = 1e9
QUOTA = "/sys/fs/cgroup/cpu.max"


def check_machine(torch: ModuleType) -> Iterator[Check]:
    """What this machine has, and what of it torch uses.

    Args:
        torch: The imported package.
    """
    yield Check(AREA, "system", Verdict.GOOD, f"{platform.platform()}, {platform.machine()}")
    yield check_gpu(
        built_for=torch.version.cuda or torch.version.hip,
        works=torch.cuda.is_available(),
        names=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else [],
        nvidia=nvidia_gpus(),
    )
    if platform.system() == "Darwin":
        yield check_mps(torch.backends.mps.is_built(), torch.backends.mps.is_available())
    yield check_threads(torch.get_num_threads(), usable_cpus(), os.environ)
    yield check_openmp(torch.__config__.parallel_info())
    yield check_compiler(os.environ.get("CXX"))
    yield check_memory(available_memory())


def check_gpu(built_for: str | None, works: bool, names: list[str], nvidia: list[str]) -> Check:
    """Whether torch uses the GPU that is there.

    Args:
        built_for: Version of CUDA or ROCm that torch was built for; None for a CPU build.
        works: Whether torch finds a device.
        names: Of the devices that it finds.
        nvidia: Names of NVIDIA GPUs that the system knows.
    """
    if works:
        return Check(AREA, "GPU", Verdict.GOOD, f"{', '.join(names)} (torch built for {built_for})")
    if not nvidia:
        build = "a CPU build" if built_for is None else f"built for {built_for}"
        return Check(AREA, "GPU", Verdict.GOOD, f"none; torch is {build} and runs on the CPU")
    there = ", ".join(nvidia)
    if built_for is None:
        return Check(
            AREA,
            "GPU",
            Verdict.WARNING,
            f"{there}, which this torch cannot use: it is a CPU-only build",
            "python -m pip uninstall torch, then install the CUDA build as torch's installation page says for your driver",
        )
    return Check(
        AREA,
        "GPU",
        Verdict.WARNING,
        f"{there}, which torch (built for CUDA {built_for}) does not find",
        "Run nvidia-smi: if it fails or shows an older CUDA than that, update the driver; else see CUDA_VISIBLE_DEVICES.",
    )


def check_mps(built: bool, works: bool) -> Check:
    """Apple's GPU."""
    if works:
        return Check(AREA, "mps", Verdict.GOOD, "Apple's GPU is used (--device mps)")
    why = "this macOS is too old for it" if built else "this torch was built without it"
    return Check(AREA, "mps", Verdict.NOTE, f"not available: {why}", "Update macOS, or install torch anew.")


def check_threads(threads: int, usable: int, environment: Mapping[str, str]) -> Check:
    """Whether torch runs as many threads as it may.

    Args:
        threads: Of torch.
        usable: Processors that this process may use.
        environment: Of the process.
    """
    setting = environment.get("OMP_NUM_THREADS")
    said = f" (OMP_NUM_THREADS={setting})" if setting else ""
    found = f"torch runs {threads}{said} on {usable} usable processor{'' if usable == 1 else 's'}"
    if threads > usable:
        return Check(
            AREA,
            "threads",
            Verdict.WARNING,
            found + ": they wait for each other",
            f"export OMP_NUM_THREADS={usable}",
        )
    if threads < usable and setting:
        return Check(
            AREA,
            "threads",
            Verdict.NOTE,
            found,
            "Unset OMP_NUM_THREADS to use all, unless others need them.",
        )
    return Check(AREA, "threads", Verdict.GOOD, found)


def check_openmp(parallel_info: str) -> Check:
    """Whether torch was built with OpenMP, without which a CPU runs on one thread.

    Args:
        parallel_info: What torch says of its build.
    """
    lines = [line.strip() for line in parallel_info.splitlines()]
    backend = next((line.partition(":")[2].strip() for line in lines if "parallel backend" in line), "")
    if backend.lower() in ("openmp", "native thread pool"):
        return Check(AREA, "OpenMP", Verdict.GOOD, f"torch's threads are {backend}")
    return Check(
        AREA,
        "OpenMP",
        Verdict.NOTE,
        f"torch's parallel backend is {backend or 'not known'}",
        "An official build of torch has OpenMP; on a CPU that is what uses all processors.",
    )


def check_compiler(chosen: str | None) -> Check:
    """A C++ compiler, which torch.compile needs on a CPU.

    Args:
        chosen: The environment's CXX.
    """
    found = next(
        (path for name in ([chosen] if chosen else []) + list(COMPILERS) if (path := shutil.which(name))),
        None,
    )
    if found is not None:
        return Check(AREA, "C++ compiler", Verdict.GOOD, f"{found}, for --compile on a CPU")
    return Check(
        AREA,
        "C++ compiler",
        Verdict.NOTE,
        "none; --compile on a CPU needs one",
        "Install g++ (Debian: apt-get install g++), clang, or the build tools of Visual Studio.",
    )


def check_memory(available: int | None) -> Check:
    """Memory that is free."""
    if available is None:
        return Check(AREA, "memory", Verdict.NOTE, "the system does not tell")
    found = f"{available / GIGA:.1f} GB available"
    if available < 2 * GIGA:
        return Check(
            AREA, "memory", Verdict.WARNING, found, "Close other programs; torch alone takes about 0.5 GB."
        )
    return Check(AREA, "memory", Verdict.GOOD, found)


def nvidia_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the system knows, whatever torch says; "an NVIDIA GPU" where no name is to be had."""
    command = shutil.which("nvidia-smi")
    if command is not None:
        try:
            done = subprocess.run(
                [command, "--query-gpu=name", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
            if names := [line.strip() for line in done.stdout.splitlines() if line.strip()]:
                return names
        except (OSError, subprocess.SubprocessError):
            pass  # A driver that does not answer is found by its files.
    return ["an NVIDIA GPU"] if any(Path(file).exists() for file in NVIDIA_FILES) else []


def usable_cpus() -> int:
    """Processors that this process may use: its affinity, and the quota of a container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path(QUOTA).read_text(encoding="ascii").split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # No container, or a system without such files.
    return count


def available_memory() -> int | None:
    """Bytes of memory that are available, or None where nobody tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        # Comes with accelerate; other systems tell it alone.
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)
