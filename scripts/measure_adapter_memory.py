"""Count the memory that training takes with and without adapters: states, and activations kept for the backward pass.

    python scripts/measure_adapter_memory.py --preset dit-xl/2 --batch 4

States are counted from shapes: weights, gradients and the two moments of AdamW of what trains, and the moving average, which shares
weights that do not change. Activations are counted by torch as it saves them in a real forward of the training step, each storage
once and parameters left out. Blocks are alike, so that two models of few blocks say what each block keeps; bytes of the published
depth follow exactly. Nothing here is a measurement of a process: allocators and workspaces come on top, on every side of the
comparison.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dydit_cli.adapters.attaching import AdapterKind, AdapterSettings, attach
from dydit_cli.adapters.bases import BaseKind, compress_base
from dydit_cli.dynamic.gates import GumbelGating, RoutingNoise
from dydit_cli.execution import DenseExecutor
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import reset_routers
from dydit_cli.families.registry import preset_named
from dydit_cli.training.method import shared_tensors

METHODS: dict[str, tuple[str, BaseKind]] = {
    "full": ("full", "fp32"),
    "lora": ("lora", "fp32"),
    "td-lora": ("td-lora", "fp32"),
    "td-lora, base bf16": ("td-lora", "bf16"),
}
MOMENTS = 2
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step.

    Attributes:
        weights: Of the model.
        gradients: Of what trains.
        moments: Of AdamW.
        average: Of the moving average, beside what it shares.
        activations: Kept for the backward pass.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.average + self.activations


def with_method(model: DynamicModel, row: str, rank: int, experts: int) -> DynamicModel:
    """The model as a run of a row of `METHODS` trains it."""
    method, base = METHODS[row]
    if method != "full":
        kind: AdapterKind = "lora" if method == "lora" else "td-lora"
        attach(model, AdapterSettings(kind, rank=rank, experts=experts))
        compress_base(model, base)
    return model.train()


def nbytes(tensors: list[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kept_by(model: DynamicModel, batch: int, checkpointing: bool) -> int:
    """Bytes that torch keeps for the backward pass of a training step's forward."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # The tensor is held as well, so that no other storage takes its place.
            held[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    if checkpointing:
        model.enable_gradient_checkpointing()
    sample, condition = model.example_inputs(batch, 0)
    times = torch.full((batch,), 0.5)
    gating = GumbelGating(RoutingNoise.draw(model.geometry, 0, 0, range(batch)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = model.denoise(sample, times, condition, executor=DenseExecutor(), gating=gating)
        output.square().mean()
    return sum(size for _, size in held.values())


def memory_of(preset: str, method: str, batch: int, rank: int, experts: int, checkpointing: bool) -> Memory:
    """Bytes of a training step of a published size."""
    family, config = preset_named(preset)
    with torch.device("meta"):
        model = with_method(family.model_class(**config), method, rank, experts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = nbytes([*model.parameters(), *model.buffers()])
    kept = []
    for depth in (2, 4):
        small = family.model_class(**(config | {"num_layers": depth}))
        reset_routers(small)
        kept.append(kept_by(with_method(small, method, rank, experts), batch, checkpointing))
    depth = int(config["num_layers"])
    return Memory(
        weights=weights,
        gradients=nbytes(trained),
        moments=MOMENTS * nbytes(trained),
        average=weights - nbytes(list(shared_tensors(model).values())),
        activations=kept[0] + (kept[1] - kept[0]) * (depth - 2) // 2,
    )


def table(rows: dict[str, Memory]) -> str:
    """Markdown, in GiB, and the share of full fine-tuning's total."""
    names = ("weights", "gradients", "moments", "average", "activations", "total")
    lines = [f"| method | {' | '.join(names)} | of full |", f"| --- |{' ---: |' * (len(names) + 1)}"]
    for method, memory in rows.items():
        cells = [f"{getattr(memory, name) / GIB:.2f}" for name in names]
        share = memory.total / rows["full"].total
        lines.append(f"| {method} | {' | '.join(cells)} | {share:.1%} |")
    return "\n".join(lines)


def arguments() -> Any:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", default="dit-xl/2", help="a published size of DiT, SiT or Latte")
    parser.add_argument("--batch", type=int, default=4, help="samples of a forward")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--experts", type=int, default=4)
    return parser.parse_args()


def main() -> None:
    """Print the tables."""
    given = arguments()
    for checkpointing in (False, True):
        rows = {
            method: memory_of(given.preset, method, given.batch, given.rank, given.experts, checkpointing)
            for method in METHODS
        }
        print(
            f"{given.preset}, batch {given.batch}, GiB{', gradient checkpointing' if checkpointing else ''}\n"
        )
        print(table(rows), end="\n\n")


if __name__ == "__main__":
    main()
