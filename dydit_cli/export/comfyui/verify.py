"""See that a written node computes, with the written file, what the model's blocks compute.

There is no ComfyUI here. So the folder that was written is imported as ComfyUI would import it, reads its routers out of the written
file, and runs each block on that file's weights in plain torch modules, with the inputs that the model's own block was given. What is
ComfyUI's alone (loading, casting, the call of replaced blocks) is not verified by this; tests do that against a stand-in.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dydit_cli.checkpoints import open_checkpoint
from dydit_cli.checkpoints.lazy import LazyTensors, lazily
from dydit_cli.export import importing
from dydit_cli.export.flux_verify import RUNNABLE, SIDES, TIMES, built, prediction
from dydit_cli.export.verify import judged
from dydit_cli.families.flux import DyFluxTransformer2DModel

CHECKED = "dydit_comfyui_check"
NORM_EPS = 1e-6


@torch.no_grad()
def node_difference(
    config: Mapping[str, Any], tensors: LazyTensors, node: Path, file: Path
) -> tuple[float, float, bool]:
    """Run a model's blocks with the package's code and with the written node.

    A model that is too large is run with one block of either kind.

    Args:
        config: Of the model, keyword arguments alone.
        tensors: What was to be written, under the model's keys.
        node: The written folder.
        file: The written weights.

    Returns:
        The largest absolute difference, the largest output (a residual stream has no scale of its own), and whether all blocks
        were run.

    Raises:
        DyditError: If it is more than rounding.
    """
    whole = sum(spec.numel for spec in tensors.specs.values()) <= RUNNABLE
    depth = {name: min(1, config[name]) for name in ("num_layers", "num_single_layers")}
    shape = dict(config) if whole else dict(config) | depth
    model = built(DyFluxTransformer2DModel, shape, tensors, torch.float32).set_execution("dense")
    recordings = {time: recorded(model, time) for time in TIMES}
    # A block of FLUX.1-dev is 1.4 GB in fp32, and the node's is held beside what is left here.
    del model
    stored = lazily(open_checkpoint(file).tensors)
    worst = scale = 0.0
    with imported(node) as package:
        routers = package.reading.read_routers(str(file))
        doubles = routers.shape.double
        chosen = [
            *range(shape["num_layers"]),
            *(doubles + index for index in range(shape["num_single_layers"])),
        ]
        for time, calls in recordings.items():
            widths = _widths(package, routers, stored, time)
            for number, (given, expected) in zip(chosen, calls, strict=True):
                prefix = (
                    f"double_blocks.{number}" if number < doubles else f"single_blocks.{number - doubles}"
                )
                found = _run(package, modules(stored, prefix), routers.blocks[number], widths[number], given)
                worst = max(worst, judged(found, expected))
                scale = max(scale, float(expected.abs().max()))
    return worst, scale, whole


def recorded(model: Any, time: float) -> list[tuple[dict[str, Any], Tensor]]:
    """Of each block in one forward: its inputs as ComfyUI names them, and its outputs, text first."""
    calls: list[tuple[dict[str, Any], Tensor]] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        image, text, conditioning, rope = arguments[:4]
        given = {"img": image.clone(), "txt": text.clone(), "vec": conditioning, "pe": rotations(rope)}
        calls.append((given, torch.cat([output[1], output[0]], dim=1)))

    hooks = [block.register_forward_hook(note) for block in model.dynamic_blocks]
    try:
        prediction(model, SIDES, time)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def rotations(rope: tuple[Tensor, Tensor]) -> Tensor:
    """(S, D) cosines and sines, each number twice -> (1, 1, S, D / 2, 2, 2) matrices, as in the original."""
    cosine, sine = (part[..., ::2] for part in rope)
    return torch.stack([cosine, -sine, sine, cosine], dim=-1).unflatten(-1, (2, 2))[None, None]


def modules(tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
    """The layers whose tensors begin with ``prefix``, as plain torch modules in fp32 under the names that follow it."""
    root = nn.Module()
    names = [key.removeprefix(f"{prefix}.") for key in tensors if key.startswith(f"{prefix}.")]
    for name in names:
        path, _, kind = name.rpartition(".")
        if kind not in ("weight", "scale") or "_rate." in name or name.startswith("token_selection."):
            continue
        weight = tensors[f"{prefix}.{name}"].float()
        layer: nn.Module
        if kind == "scale":
            layer = nn.RMSNorm(len(weight), eps=NORM_EPS)
        else:
            layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            layer.bias = nn.Parameter(tensors[f"{prefix}.{path}.bias"].float())
        layer.weight = nn.Parameter(weight)
        _place(root, path.split("."), layer)
    return root


def imported(folder: Path) -> AbstractContextManager[ModuleType]:
    """Import a folder as a package, as ComfyUI does; see `importing.imported`."""
    return importing.imported(CHECKED, folder / "__init__.py")


def _widths(package: Any, routers: Any, tensors: Mapping[str, Tensor], time: float) -> Any:
    """What the node decides at a timestep."""
    layers = modules(tensors, "time_in")
    embed = nn.Sequential(layers.get_submodule("in_layer"), nn.SiLU(), layers.get_submodule("out_layer"))
    embedding = embed(package.patch.sinusoids(torch.tensor([time])))
    return routers.widths(embedding, 0.0)


def _run(package: Any, block: nn.Module, routers: Any, parts: Any, given: Mapping[str, Any]) -> Tensor:
    """The outputs of a block by the node's code, text first."""
    host = package.host.TorchHost()
    if routers.double:
        image, text = package.patch.run_double(block, routers, parts, dict(given), 0.0, host)
        return torch.cat([text, image], dim=1)
    length = given["txt"].shape[1]
    joined = dict(given) | {"img": torch.cat([given["txt"], given["img"]], dim=1)}
    tokens: Tensor = package.patch.run_single(block, routers, parts, joined, length, 0.0, host)
    return tokens


def _place(root: nn.Module, path: list[str], layer: nn.Module) -> None:
    """Register a layer below a module, with what lies between."""
    for name in path[:-1]:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    root.add_module(path[-1], layer)
