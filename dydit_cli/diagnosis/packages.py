"""The packages that dydit needs and those that it can use: versions against its bounds, and whether they can be imported."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from dydit_cli.diagnosis.check import Check, Verdict

PACKAGE = Path(__file__).resolve().parent.parent
AREA_NEEDED, AREA_OPTIONAL = "needed", "optional"
LEAST_PYTHON = (3, 11)

# Those whose import shows whether the whole of them fits together; a wrong build of one breaks another.
IMPORTED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "av")
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "fvcore": "fvcore"}

OPTIONAL = {
    "tensorboard": "curves of a fine-tuning in TensorBoard",
    "wandb": "curves of a fine-tuning in Weights & Biases",
    "bitsandbytes": "optimisers with 8-bit states; frozen weights as int8 or nf4",
    "torchao": "quantising an export with diffusers; no command needs it",
    "onnx": "`dydit export --format onnx`",
    "onnxscript": "`dydit export --format onnx`",
    "onnxruntime": "`dydit export --format onnx`, and running what it writes",
    "triton": "torch.compile on CUDA",
    "huggingface_hub": "checkpoints of the Hub by name",
}

REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9_.-]+)\s*(?P<bounds>[^;\[]*)")
BOUND = re.compile(r"(>=|<=|==|!=|<|>)\s*([\w.]+)")


def check_python() -> Check:
    """Python itself."""
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] >= LEAST_PYTHON:
        return Check(AREA_NEEDED, "python", Verdict.GOOD, found)
    least = ".".join(map(str, LEAST_PYTHON))
    return Check(AREA_NEEDED, "python", Verdict.BROKEN, found, f"Install Python {least} or newer.")


def check_dydit(version: str) -> Check:
    """This package, of a version that the caller knows, and where it runs from."""
    return Check(AREA_NEEDED, "dydit", Verdict.GOOD, f"{version} ({PACKAGE})")


def check_needed() -> Iterator[Check]:
    """Every package that dydit's metadata asks for."""
    for name, bounds in requirements().items():
        yield check_package(name, bounds)


def check_optional() -> Iterator[Check]:
    """Packages that some commands use if they are there."""
    for name, purpose in OPTIONAL.items():
        version = version_of(name)
        if version is None:
            yield Check(
                AREA_OPTIONAL,
                name,
                Verdict.NOTE,
                f"not installed; for {purpose}",
                f"python -m pip install {name}",
            )
        else:
            yield Check(AREA_OPTIONAL, name, Verdict.GOOD, f"{version}, for {purpose}")


def check_package(name: str, bounds: str) -> Check:
    """A package that is needed: there, within its bounds, and importable.

    Args:
        name: Of the distribution.
        bounds: As metadata write them, such as ``>=0.21,<0.22``.
    """
    version = version_of(name)
    wanted = f'python -m pip install "{name}{bounds}"'
    if version is None:
        return Check(AREA_NEEDED, name, Verdict.BROKEN, "not installed", wanted)
    if not within(version, bounds):
        return Check(AREA_NEEDED, name, Verdict.BROKEN, f"{version}, where {bounds} is needed", wanted)
    fault = import_fault(MODULES.get(name, name)) if name in IMPORTED else None
    if fault is not None:
        return Check(
            AREA_NEEDED,
            name,
            Verdict.BROKEN,
            f"{version}, which cannot be imported: {fault}",
            advice_for(name, fault),
        )
    return Check(AREA_NEEDED, name, Verdict.GOOD, version)


def advice_for(name: str, fault: str) -> str:
    """What mends a package that is there and cannot be imported."""
    if "torchvision" in fault:
        return "torchvision belongs to another torch and dydit does not need it: python -m pip uninstall torchvision"
    return f"python -m pip install --force-reinstall --no-deps {name}, or make a fresh environment"


def requirements() -> dict[str, str]:
    """Package -> bounds: from the installed metadata, or from pyproject.toml where dydit runs from a checkout."""
    try:
        lines = metadata.requires("dydit") or []
    except metadata.PackageNotFoundError:
        lines = _from_checkout()
    found = {}
    for line in lines:
        match = REQUIREMENT.match(line)
        if match and "extra ==" not in line:
            found[match["name"]] = match["bounds"].strip().strip("()")
    return found


def _from_checkout() -> list[str]:
    file = PACKAGE.parent / "pyproject.toml"
    try:
        project: Mapping[str, list[str]] = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return []
    return list(project.get("dependencies", []))


def version_of(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def within(version: str, bounds: str) -> bool:
    """Whether a version satisfies bounds; compares the leading numbers of each part, which is what dydit's bounds are made of."""
    here = numbers(version)
    for sign, bound in BOUND.findall(bounds):
        there = numbers(bound)
        length = max(len(here), len(there))
        a, b = (part + (0,) * (length - len(part)) for part in (here, there))
        holds = {
            ">=": a >= b,
            "<=": a <= b,
            "==": a == b,
            "!=": a != b,
            "<": a < b,
            ">": a > b,
        }[sign]
        if not holds:
            return False
    return True


def numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0); a part counts up to its first letter, and the rest is left out."""
    found = []
    for part in version.split("+")[0].split("."):
        match = re.match(r"\d+", part)
        if match is None:
            break
        found.append(int(match[0]))
        if match[0] != part:
            break
    return tuple(found)


def import_fault(module: str) -> str | None:
    """Why a module cannot be imported, in one line; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a broken build raises is what is to be told
        said = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {said}"[:200]
    return None
