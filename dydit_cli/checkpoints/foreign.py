"""Quantised files that cannot be ranked and fine-tuned, recognised by their keys: what they are, and what to bring instead.

These formats store integers that only their own kernels understand, rounded too coarsely to train from. The unquantised file
of the same model exists for each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from dydit_cli.checkpoints.lazy import LazyTensors
from dydit_cli.errors import DyditError

BRING = "Bring the model's bf16 or fp16 .safetensors file or diffusers folder; fp8 files are read as well."

# Format -> endings of keys that only it has.
BITSANDBYTES_4 = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
BITSANDBYTES_8 = (".SCB", ".weight_format")
SVDQUANT = (".wscales", ".smooth_factor", ".proj_down", ".proj_up", ".qweight", ".wzeros", ".lora_down_qkv")
INTEGER_GROUPS = (".qzeros", ".g_idx", ".weight_packed", ".weight_scale_2", ".weight_scale_inv")


def refuse_gguf(path: Path) -> None:
    """Raise if ``path`` is a GGUF file, by its name or its first bytes.

    Raises:
        DyditError: If it is.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix.lower() == ".gguf":
        raise _refused(path, "GGUF", "its blocks of packed integers were made for llama.cpp-style inference")


def refuse_foreign(tensors: LazyTensors, path: Path) -> None:
    """Raise if the keys or types of ``tensors`` are those of a format that dydit does not read.

    Raises:
        DyditError: With the format's name, a key that gave it away, and the file to bring.
    """
    # SVDQuant before the generic names, of which it has some.
    if key := _ending(tensors, (".wscales", ".smooth_factor")):
        raise _refused(path, "SVDQuant (nunchaku)", f"its 4-bit weights stand beside keys such as '{key}'")
    if key := next((key for key in tensors if ".quant_state." in key), _ending(tensors, BITSANDBYTES_4)):
        raise _refused(
            path, "bitsandbytes 4-bit (nf4 or fp4)", f"its packed weights stand beside keys such as '{key}'"
        )
    if key := _ending(tensors, BITSANDBYTES_8):
        raise _refused(path, "bitsandbytes int8", f"its integers stand beside keys such as '{key}'")
    if key := _ending(tensors, (*SVDQUANT, *INTEGER_GROUPS)):
        raise _refused(path, "group-quantised", f"its packed weights stand beside keys such as '{key}'")
    for key in tensors:
        if key.endswith(".comfy_quant"):
            _refuse_comfy(tensors, key, path)
        elif key.endswith((".weight", ".bias")) and not tensors.spec(key).dtype.is_floating_point:
            kind = str(tensors.spec(key).dtype).removeprefix("torch.")
            raise _refused(path, "an integer format", f"'{key}' is of type {kind}")


def _refuse_comfy(tensors: LazyTensors, key: str, path: Path) -> None:
    """Each layer of ComfyUI's newer files says its format as JSON in a tensor of bytes."""
    try:
        said = str(json.loads(bytes(tensors[key].tolist()).decode("utf-8"))["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise _refused(
            path, "an unknown quantised format", f"'{key}' holds no readable description"
        ) from error
    if not said.startswith("float8"):
        raise _refused(path, said, f"'{key}' says so")


def _ending(keys: Iterable[str], endings: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key.endswith(endings)), None)


def _refused(path: Path, title: str, found: str) -> DyditError:
    return DyditError(
        f"{path} is quantised: {title}.",
        why=f"Ranking and fine-tuning need the weights themselves; {found}.",
        fix=BRING,
    )
