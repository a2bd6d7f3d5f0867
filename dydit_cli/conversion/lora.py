"""Merge LoRA files into a FLUX before its units are ranked: ``--lora FILE:SCALE``.

Files come from many trainers: diffusers and peft (``lora_A``), kohya and ComfyUI (``lora_down``), XLabs, fal and the originals'
control adapters. diffusers' own converters bring them to its names. They leave out what they do not know with no more than a log
line; here a key that would have no effect on the model is an error, because a merge that does half of its work looks like
one that did all of it. Only what belongs to the text encoders, which are not part of the model, is left out and reported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dydit_cli.checkpoints.lazy import LazyTensors, TensorSpec, lazily
from dydit_cli.checkpoints.merged import LowRankUpdate, Merged
from dydit_cli.checkpoints.reading import stored_tensors
from dydit_cli.errors import DyditError, did_you_mean

TEXT_ENCODERS = ("text_encoder", "text_encoders.", "lora_te", "lora_clip", "lora_t5")
PEFT_PREFIX = "base_model.model."
ORIGINAL_BLOCKS = re.compile(r"(?:^|\.)(double_blocks|single_blocks)\.")

# Names that only other kinds of adapters have.
OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "oft_": "OFT",
    ".diff": "a full difference of weights",
}
PART = re.compile(
    r"^(?:transformer\.)?(?P<layer>.+)\.(?P<side>lora_A|lora_B|lora\.down|lora\.up)\.(?P<kind>weight|bias)$"
)
DOWN = ("lora_A", "lora.down")


@dataclass(frozen=True)
class LoraFile:
    """An adapter under diffusers' names.

    Attributes:
        path: Where it was read.
        updates: Layer -> what is added, with the file's own scale (alpha / r).
        left_out: Keys that belong to text encoders.
    """

    path: Path
    updates: dict[str, LowRankUpdate]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class MergedLora:
    """What was merged, for the report.

    Attributes:
        path: The file.
        scale: The user's.
        layers: How many layers it changed.
        left_out: How many of its keys belong to text encoders.
    """

    path: str
    scale: float
    layers: int
    left_out: int


def parse_lora(text: str) -> tuple[Path, float]:
    """Split ``FILE:SCALE``; the scale is 1 where there is none.

    Raises:
        DyditError: If what follows the colon is no number.
    """
    name, colon, scale = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return Path(text).expanduser(), 1.0
    try:
        value = float(scale)
    except ValueError as error:
        raise _no_scale(text, scale) from error
    if not math.isfinite(value):
        raise _no_scale(text, scale)
    return Path(name).expanduser(), value


def merge_loras(
    tensors: Mapping[str, Tensor], loras: Sequence[str]
) -> tuple[LazyTensors, tuple[MergedLora, ...]]:
    """Add LoRAs to a FLUX's weights when those are read.

    Args:
        tensors: Under diffusers' keys.
        loras: ``FILE:SCALE`` each; they add up, and a file may stand there more than once.

    Returns:
        The merged tensors, and what was merged.

    Raises:
        DyditError: If a file is missing, no LoRA, or has a key or shape that fits no layer of the model.
    """
    specs = lazily(tensors).specs
    updates: dict[str, list[LowRankUpdate]] = {}
    merged = []
    for text in loras:
        path, scale = parse_lora(text)
        lora = read_lora(path)
        _check_fit(lora, specs)
        for layer, update in lora.updates.items():
            scaled = LowRankUpdate(update.down, update.up, scale * update.scale, update.bias)
            updates.setdefault(layer, []).append(scaled)
        merged.append(MergedLora(str(path), scale, len(lora.updates), len(lora.left_out)))
    return Merged(tensors, updates), tuple(merged)


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA file, or a folder that diffusers or peft saved one into.

    Raises:
        DyditError: If it is missing or no LoRA for FLUX that the installed diffusers knows.
    """
    file, settings = _find(path)
    tensors = dict(stored_tensors(file))
    left_out = tuple(key for key in tensors if key.startswith(TEXT_ENCODERS))
    kept = {key: tensor for key, tensor in tensors.items() if key not in left_out}
    _refuse_other_kinds(file, kept)
    converted, alphas = _converted(file, _without_peft_prefix(kept))
    return LoraFile(file, _updates(file, converted, alphas, settings), left_out)


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    """The weight file, and the settings that peft or diffusers wrote with it."""
    if path.is_dir():
        names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            raise DyditError(
                f"The folder {path} holds no LoRA.",
                why=f"None of {', '.join(names)} is in it.",
                fix="Pass the LoRA's file itself.",
            )
        config = path / "adapter_config.json"
        if config.exists():
            return found[0], _json_object(config.read_text(encoding="utf-8"))
        path = found[0]
    if not path.exists():
        raise DyditError(
            f"There is no LoRA at {path}.",
            why="Neither a file nor a folder of that name exists.",
            fix="Write --lora FILE:SCALE with an existing file; relative paths start from the folder in which dydit runs.",
        )
    return path, _file_settings(path)


def _file_settings(path: Path) -> dict[str, Any]:
    """What newer diffusers writes into a file's header: peft's settings, each with the component in front."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    except (SafetensorError, OSError):
        # Reading the tensors, which comes next, explains what is wrong with the file.
        return {}
    content = _json_object(text)
    return {
        key.removeprefix("transformer."): value
        for key, value in content.items()
        if key.startswith("transformer.")
    }


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _refuse_other_kinds(path: Path, keys: Iterable[str]) -> None:
    for key in keys:
        for mark, kind in OTHER_KINDS.items():
            if mark in key:
                raise DyditError(
                    f"{path} is not a plain LoRA.",
                    why=f"Its key '{key}' is one of {kind}, which is not the sum of the weight and a product of two matrices.",
                    fix="Merge it with the tool that it was made with, and convert the merged model.",
                )


def _without_peft_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain peft files of diffusers' layers lose their prefix; with the original's layers diffusers' converter wants it."""
    ours = all(key.startswith(PEFT_PREFIX) and not ORIGINAL_BLOCKS.search(key) for key in tensors)
    return {key.removeprefix(PEFT_PREFIX) if ours else key: tensor for key, tensor in tensors.items()}


def _converted(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Through diffusers' converters: (tensors under its names, alphas that are not in them yet)."""
    prepared = _as_comfy(tensors)
    _refuse_silent_losses(path, prepared)
    try:
        from diffusers.loaders import FluxLoraLoaderMixin
    except ImportError as error:
        raise DyditError(
            "The LoRA converters of diffusers cannot be loaded.",
            why=f"They need transformers and peft: {error}.",
            fix="Install them beside dydit: pip install transformers peft.",
        ) from error
    try:
        converted, alphas = FluxLoraLoaderMixin.lora_state_dict(prepared, return_alphas=True)
    except Exception as error:
        # The converters pop keys from a dictionary and assert: anything may come out of a file they were not made for.
        raise DyditError(
            f"{path} is not a FLUX LoRA that the installed diffusers converts.",
            why=f"Its converter stopped: {type(error).__name__}: {' '.join(str(error).split())[:200]}.",
            fix="Convert it with the tool that it was made with to diffusers' or kohya's format.",
        ) from error
    return converted, dict(alphas or {})


def _as_comfy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give ``lora_A`` and ``lora_B`` of the original's layers the names under which diffusers' converter knows them.

    Control adapters (with norms) and fal's (with peft's prefix) have converters of their own.
    """
    if any("query_norm" in key or key.startswith(PEFT_PREFIX) for key in tensors):
        return tensors
    if not any(ORIGINAL_BLOCKS.search(key) and ".lora_A." in key for key in tensors):
        return tensors
    return {
        "diffusion_model."
        + key.removeprefix("transformer.")
        .removeprefix("diffusion_model.")
        .replace(".lora_A.", ".lora_down.")
        .replace(".lora_B.", ".lora_up."): tensor
        for key, tensor in tensors.items()
    }


def _refuse_silent_losses(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Kohya's converter takes one family of names from a file and drops the others without an error."""
    if not any(".lora_down.weight" in key for key in tensors):
        return
    for family in (("transformer.",), ("lora_transformer_",), ("lora_unet_", "diffusion_model.")):
        if any(key.startswith(family) for key in tensors):
            lost = [key for key in tensors if not key.startswith(family) or "position_embedding" in key]
            if lost:
                raise _matches_nothing(path, lost[0], "diffusers' converter drops it")
            return


def _updates(
    path: Path, converted: Mapping[str, Tensor], alphas: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, LowRankUpdate]:
    sides: dict[str, dict[str, Tensor]] = {}
    found_alphas = {_layer_of_alpha(key): float(value) for key, value in alphas.items()}
    for key, tensor in converted.items():
        match = PART.match(key)
        if match is not None and not (match["kind"] == "bias" and match["side"] in DOWN):
            side = "bias" if match["kind"] == "bias" else "down" if match["side"] in DOWN else "up"
            sides.setdefault(match["layer"], {})[side] = tensor
        elif key.endswith(".alpha"):
            found_alphas[_layer_of_alpha(key)] = float(tensor)
        else:
            raise _matches_nothing(path, key, "it is neither side of a low-rank update")
    for layer in found_alphas:
        if layer not in sides:
            raise _matches_nothing(path, f"{layer}.alpha", "there is no update that it would scale")
    if not sides:
        raise DyditError(
            f"{path} holds no update of a FLUX.",
            why="No key of it is one of a layer's lora_A or lora_B.",
            fix="Pass the file of a LoRA that was trained on a FLUX transformer.",
        )
    return {layer: _update(path, layer, parts, found_alphas, settings) for layer, parts in sides.items()}


def _update(
    path: Path,
    layer: str,
    parts: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    settings: Mapping[str, Any],
) -> LowRankUpdate:
    missing = {"down", "up"} - set(parts)
    if missing:
        side = "lora_A" if "down" in missing else "lora_B"
        raise DyditError(
            f"{path} has half of an update for '{layer}'.",
            why=f"Its {side} is missing.",
            fix="Copy or download the file again.",
        )
    down, up = parts["down"], parts["up"]
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        raise DyditError(
            f"The two sides of {path}'s update for '{layer}' do not fit each other.",
            why=f"They are of shape {tuple(down.shape)} and {tuple(up.shape)}; (r, in) and (out, r) are needed.",
            fix="Copy or download the file again.",
        )
    rank = down.shape[0]
    alpha = alphas.get(layer, _alpha_in(settings, layer, rank))
    return LowRankUpdate(
        down, up, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank), parts.get("bias")
    )


def _alpha_in(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """peft's alpha for a layer: its own pattern's, else the common one; equal to the rank where nothing is said."""
    for pattern, alpha in dict(settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return float(alpha)
    return float(settings.get("lora_alpha") or rank)


def _layer_of_alpha(key: str) -> str:
    return re.sub(r"(\.lora_A\.weight|\.lora\.down\.weight)?\.alpha$", "", key).removeprefix("transformer.")


def _check_fit(lora: LoraFile, specs: Mapping[str, TensorSpec]) -> None:
    for layer, update in lora.updates.items():
        key = f"{layer}.weight"
        if key not in specs:
            near = did_you_mean(key, specs)
            raise _matches_nothing(
                lora.path, layer, f"the model has no such layer{f' ({near})' if near else ''}"
            )
        shape = (update.up.shape[0], update.down.shape[1])
        if specs[key].shape != shape:
            raise DyditError(
                f"The update of {lora.path} for '{layer}' does not fit the model.",
                why=f"It changes a matrix of shape {shape}; the model's is {specs[key].shape}.",
                fix="Merge it into the model that it was trained on; control LoRAs need the Control model.",
            )
        if update.bias is not None and f"{layer}.bias" not in specs:
            raise _matches_nothing(lora.path, f"{layer}.lora_B.bias", "the layer has no bias")


def _matches_nothing(path: Path, key: str, why: str) -> DyditError:
    return DyditError(
        f"The key '{key}' of {path} matches nothing in the model.",
        why=f"Merging would leave it out silently: {why}.",
        fix="Use a LoRA that was trained on this model; siblings with fewer blocks need LoRAs of their own.",
    )


def _no_scale(text: str, scale: str) -> DyditError:
    return DyditError(
        f"'{text}' is not a LoRA with its scale.",
        why=f"'{scale}' after the colon is no number, and no file of the whole name exists.",
        fix="Write it like style.safetensors:0.8.",
    )
