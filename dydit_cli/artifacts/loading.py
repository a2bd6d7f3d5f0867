"""Load a dynamic model from an artifact or an export. Needs torch, safetensors and diffusers only."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dydit_cli.dynamic.baked import fixed_widths
from dydit_cli.dynamic.routers import WIDTHS
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import require
from dydit_cli.families.registry import class_named, family_named
from dydit_cli.plugged import provider_of

CONFIG_NAME = "config.json"


def model_folder(path: str | Path) -> Path:
    """Find the folder with the model's ``config.json``: the path itself, or ``transformer/`` in an exported pipeline.

    Raises:
        DyditError: If there is none.
    """
    path = Path(path)
    for folder in (path, path / "transformer"):
        if (folder / CONFIG_NAME).is_file():
            return folder
    if (path / "checkpoints").is_dir():
        raise DyditError(
            f"{path} is an unfinished fine-tuning run.",
            why="It has checkpoints, but no final weights yet.",
            fix="Finish it with the same command and --resume.",
        )
    raise DyditError(
        f"There is no model at {path}.",
        why=f"Neither {CONFIG_NAME} nor transformer/{CONFIG_NAME} is there."
        if path.exists()
        else "No such folder exists.",
        fix="Pass the --out folder of `dydit convert`, `dydit finetune` or `dydit export --format diffusers`.",
    )


def model_config(path: str | Path) -> dict[str, Any]:
    """Read a model's ``config.json``.

    Raises:
        DyditError: If it is missing, damaged, or of a class that is not ours.
    """
    file = model_folder(path) / CONFIG_NAME
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        name = str(config["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DyditError(
            f"{file} is not a model's configuration.",
            why=f"It cannot be read as JSON with a '_class_name' ({type(error).__name__}).",
            fix="Run the stage that wrote it again, or copy the folder again.",
        ) from error
    if class_named(name) is None:
        raise DyditError(
            f"{file} describes a {name}, which is not a dynamic model.",
            why="dydit loads models that `dydit convert` has made dynamic.",
            fix="Run `dydit convert --checkpoint ... --out C` first and pass C.",
        )
    return dict(config)


def load_model(
    path: str | Path,
    execution: str = "compact",
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    keep_bias: float = 0.0,
    *,
    budget: float | None = None,
    compile: bool = False,  # noqa: A002
    graphs: bool = False,
    token_capacity: float | None = None,
    convention: str = "stored",
) -> DynamicModel:
    """Load a dynamic model for inference.

    Args:
        path: Folder of `dydit convert`, `dydit finetune` or a diffusers export.
        execution: ``compact`` (only kept units cost), ``dense`` (masks multiplied) or ``static`` (complete model).
        torch_dtype: Cast the weights; fp32 by default. Router decisions are made in fp32 whatever it is.
        device: Where to put the model; the CPU by default.
        keep_bias: Added to all router logits, a dial without training; +inf is the complete model.
        budget: The ratio to run at, of a model that was trained for a range of them; its own default without it.
        compile: Whether blocks are compiled with `torch.compile`, at their first forward; for compact and static execution.
        graphs: Whether whole steps are recorded as CUDA graphs; for compact and static execution on a CUDA device.
        token_capacity: Room for this share of a batch's tokens in the MLPs, which makes shapes static; for compact execution.
        convention: ``stored``, or ``native`` to read a pipeline export in its family's own convention of t and prediction.

    Returns:
        A module in eval mode with the forward of diffusers' class.

    Raises:
        DyditError: If the folder holds no whole dynamic model, and for an execution that is not possible.
    """
    if convention not in ("stored", "native"):
        raise DyditError(
            f"There is no convention called '{convention}'.",
            why="A model is read in the convention it is stored in, or in its family's native one.",
            fix="Pass convention='stored' or convention='native'.",
        )
    config = model_config(path)
    stored = class_named(config["_class_name"])
    if stored is None:
        raise TypeError(config["_class_name"])
    model_class = family_named(stored.family).model_class if convention == "native" else stored
    folder = model_folder(path)
    _check_plugin(config, folder)
    try:
        model: DynamicModel
        model, report = model_class.from_pretrained(
            str(folder),
            torch_dtype=torch_dtype or torch.float32,
            output_loading_info=True,
            # Never the pickled .bin files that diffusers would fall back to.
            use_safetensors=True,
        )
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise DyditError(
            f"The weights in {folder} cannot be loaded.",
            why=f"A weight file is missing, damaged or does not fit config.json: {_first_line(error)}",
            fix="Copy the folder again, or run the stage that wrote it again.",
        ) from error
    _check_whole(model, report, folder)
    model.eval().requires_grad_(False)
    model.set_execution(execution, compile, graphs=graphs, token_capacity=token_capacity)
    model.set_keep_bias(keep_bias)
    if budget is not None:
        model.set_budget(budget)
    return model.to(device) if device is not None else model


def _check_plugin(config: dict[str, Any], folder: Path) -> None:
    """See that a model whose routers are a plug-in's finds them, and that they are those that it was made with.

    Raises:
        DyditError: If the plug-in is not loaded, with its name.
    """
    width = config.get("width", "free")
    recorded = next(
        (each for each in _recorded_plugins(folder) if f"width {width}" in each.get("provides", ())), None
    )
    if isinstance(width, str) and width not in WIDTHS:
        name = recorded["name"] if recorded else None
        raise DyditError(
            f"{folder} has routers of the kind '{width}', which dydit does not have.",
            why=f"They come from the plug-in {name} (sha256 {recorded['sha256'][:12]}), which is not loaded."
            if recorded
            else "They come from a plug-in, which is not loaded.",
            fix=f"Pass --plugin {name or 'FILE'}, or call dydit_cli.load_plugin('{name or 'FILE'}') first.",
        )
    loaded = provider_of("width", width)
    if recorded and loaded and recorded["sha256"] != loaded.sha256:
        warnings.warn(
            f"{folder} was made with another version of the plug-in {loaded.name} (sha256 {recorded['sha256'][:12]}, "
            f"loaded {loaded.sha256[:12]}): its routers may decide otherwise.",
            stacklevel=3,
        )


def _recorded_plugins(folder: Path) -> list[dict[str, Any]]:
    """What an artifact's manifest says of plug-ins; nothing where there is no manifest, or an older one."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("plugins", [])
    except (OSError, ValueError, AttributeError):
        return []
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _check_whole(model: DynamicModel, report: dict[str, Any], folder: Path) -> None:
    """Raise unless every tensor came from the file; diffusers only warns, and leaves what is missing without values."""
    misfits = {
        name.replace("_keys", ""): sorted(report[name]) for name in ("missing_keys", "unexpected_keys")
    }
    faults = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in misfits.items() if keys]
    if not faults:
        faults = [
            f"{name} does not name every unit once"
            for name, order in model.named_buffers()
            if name.endswith(("head_order", "channel_order"))
            and not torch.equal(order.sort().values, torch.arange(len(order), device=order.device))
        ]
    if faults:
        raise DyditError(
            f"The weights in {folder} are not those of its config.json.",
            why=f"Of their tensors, {'; '.join(faults[:3])}.",
            fix="Copy the folder again, or run the stage that wrote it again.",
        )


def load_for_training(path: str | Path, device: torch.device | str | None = None) -> DynamicModel:
    """Load a dynamic model in fp32, dense, with gradients on everything but the position table.

    Raises:
        DyditError: As `load_model`, and for a family that dydit does not train, or baked widths.
    """
    stored = class_named(model_config(path)["_class_name"])
    if stored is not None:
        require(family_named(stored.family), "dydit finetune")
    model = load_model(path, execution="dense", device=device, convention="native")
    if model.config.get("baked") is not None:
        raise fixed_widths("It cannot be fine-tuned.")
    model.train()
    for parameter in (*model.backbone_parameters(), *model.router_parameters()):
        parameter.requires_grad_(True)
    return model


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[
        :200
    ]
