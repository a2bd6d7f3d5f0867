"""FSDP2: each process holds its part of every tensor, and whole weights of one block at a time.

torch's `fully_shard` acts on the forward of modules. Blocks are modules of their own, called as such under every executor, and
each makes a group. The width routers of all blocks are asked before the first block runs, and embedders and final layer outside of
all blocks: together they are the one group of the root, which is whole for the length of a forward.

A forward must go through the root, a `Denoiser`. What stands in state dicts, moments and averages are parts (DTensors); `whole`
brings one together, which all processes must do at the same time, and `like` cuts one up again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dydit_cli.dynamic.gates import CompleteGating, Gating
from dydit_cli.dynamic.routing import Routing
from dydit_cli.errors import DyditError
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.text_condition import Condition
from dydit_cli.processes.world import World
from dydit_cli.training.average import Sharding
from dydit_cli.training.step import Denoiser

ROUTER = "_router"


def shard(model: DynamicModel, world: World, device: torch.device, mixed_precision: str) -> Denoiser:
    """Replace the parameters of ``model`` by this process's parts.

    Args:
        model: On the CPU or on ``device``; only a block at a time is moved whole.
        world: The processes that share it.
        device: Where the parts lie and everything is computed.
        mixed_precision: Under bf16 blocks are handed round, and kept for the backward pass, in bf16; routers, embedders and the final
            layer stay in fp32, as under autocast.

    Returns:
        The root, through which every forward goes.

    Raises:
        DyditError: If torch is too old.
    """
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise DyditError(
            f"torch {torch.__version__} cannot shard this model.",
            why="Its fully_shard cannot leave parameters of a module, here routers, to another group.",
            fix="Install torch 2.7 or newer, or set sharding to ddp.",
        )
    mesh = init_device_mesh(device.type, (world.size,))
    # Without casting inputs: the stream of tokens stays in fp32, as under autocast.
    low = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        if mixed_precision == "bf16"
        else MixedPrecisionPolicy(cast_forward_inputs=False)
    )
    routers = _routers_of(model)
    decided = {parameter for router in routers for parameter in router.parameters()}
    for block in model.dynamic_blocks:
        fully_shard(block, mesh=mesh, mp_policy=low, ignored_params=decided, reshard_after_forward=True)
    root = Denoiser(model)
    # As children of the root, outside of the blocks, they belong to its group.
    root.routers = nn.ModuleList(routers)
    full = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(root, mesh=mesh, mp_policy=full, reshard_after_forward=True)
    return root


def _routers_of(model: DynamicModel) -> list[nn.Module]:
    """The outermost modules that are called routers, in their order."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name.endswith(ROUTER) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return list(found.values())


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are parts."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """A tensor whose parts the processes hold, all of it; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """This process's part of a whole tensor that all of them have, cut as ``other`` is; the tensor itself where that is whole."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def whole_tensors(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors, in the first process; in the others nothing. Those brought together lie on the CPU."""
    found = {}
    for name, tensor in tensors.items():
        together = whole(tensor.detach())
        if world.is_first:
            found[name] = together.cpu() if isinstance(tensor, DTensor) else together
    return found


def whole_model(model: DynamicModel, world: World) -> DynamicModel | None:
    """A model with whole weights: the same one where nothing is sharded; else a copy on the CPU, in the first process alone."""
    if not is_sharded(model):
        return model
    tensors = whole_tensors(model.state_dict(), world)
    if not world.is_first:
        return None
    with torch.device("meta"):
        made: DynamicModel = type(model).from_config(model.config)
    made.load_state_dict(tensors, assign=True)
    made.keep_bias = model.keep_bias
    return made.eval().requires_grad_(False)


def load_whole(model: DynamicModel, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors, of which each process keeps its part."""
    places = model.state_dict()
    model.load_state_dict({name: like(tensor, places.get(name, tensor)) for name, tensor in tensors.items()})


class Autocast(nn.Module):
    """A sharded root under autocast, as accelerate calls those that it wraps.

    Args:
        root: From `shard`.
        accelerator: Of the run.
    """

    def __init__(self, root: Denoiser, accelerator: Accelerator) -> None:
        super().__init__()
        self.root = root
        self._accelerator = accelerator

    def forward(
        self, noisy: Tensor, t: Tensor, condition: Condition, branches: Sequence[tuple[str, Gating]]
    ) -> list[tuple[Tensor, Routing]]:
        """See `Denoiser`."""
        with self._accelerator.autocast():
            outcomes: list[tuple[Tensor, Routing]] = self.root(noisy, t, condition, branches)
        return outcomes


class ShardedTeacher:
    """The complete model as it was before training, in parts. See `Teacher`.

    Args:
        model: As it is before its first step.
        sharding: Spreads a copy of it.
    """

    def __init__(self, model: DynamicModel, sharding: Sharding) -> None:
        self._root = sharding(copy.deepcopy(model).eval().requires_grad_(False))

    @torch.no_grad()
    def predict(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Teacher`."""
        ((prediction, _),) = self._root(noisy, t, condition, [("static", CompleteGating())])
        return prediction
