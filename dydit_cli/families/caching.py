"""diffusers' step caches on dynamic models: a denoising step reuses what an earlier one computed, by hooks on the blocks.

Such a cache decides in a block's place whether the block runs. It needs to know what a class of blocks takes and returns, a
context in which it counts the steps of a run, and an end of the run. Pipelines of newer models give the last two; those that call
a DiT do not, so that the model gives them itself. Caches that hook parts of blocks (attention, a projection) are refused: executors
read the weights of these parts and do not call them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from inspect import signature
from typing import Any

from torch import nn

from dydit_cli.errors import DyditError

OF_WHOLE_BLOCKS = ("FirstBlockCacheConfig", "MagCacheConfig")
TAYLOR = "TaylorSeerCacheConfig"
LAST_LAYERS = ("final_layer", "proj_out")
"""How families call the layer behind their blocks."""


def register_blocks(blocks: Sequence[nn.Module], wanted: bool = False) -> None:
    """Tell diffusers what the classes of blocks take and return.

    Args:
        blocks: All blocks of a model.
        wanted: Whether to import diffusers' hooks for it; else it is done where they are imported already.
    """
    if not wanted and "diffusers.hooks" not in sys.modules:
        return
    from diffusers.hooks.first_block_cache import TransformerBlockRegistry
    from diffusers.models.attention import BasicTransformerBlock

    # The class of such entries has no public name.
    make_metadata = type(TransformerBlockRegistry.get(BasicTransformerBlock))
    for kind in {type(block) for block in blocks}:
        text = "encoder_hidden_states" in signature(kind.forward).parameters
        metadata = make_metadata(
            return_hidden_states_index=0, return_encoder_hidden_states_index=1 if text else None
        )
        TransformerBlockRegistry.register(model_class=kind, metadata=metadata)


def check_cache(model: nn.Module, blocks: Sequence[nn.Module], config: Any) -> Any:
    """The configuration of a cache as it serves a dynamic model.

    Raises:
        DyditError: For a cache that would be without effect, or wrong.
    """
    kind = type(config).__name__
    if kind in OF_WHOLE_BLOCKS and len(blocks) < 2:
        raise DyditError(
            f"A {kind} needs two blocks, and the model has {len(blocks)}.",
            why="It skips all blocks behind the first.",
            fix="Run the model without a cache.",
        )
    if kind in OF_WHOLE_BLOCKS:
        return config
    if kind == TAYLOR:
        return _whole_layers(model, blocks, config)
    raise DyditError(
        f"A dynamic model takes no {kind}.",
        why="It hooks the attention layers, which dynamic execution does not call, or asks for what no pipeline of these models gives.",
        fix="Choose FirstBlockCacheConfig, MagCacheConfig or TaylorSeerCacheConfig(use_lite_mode=True), which hook whole blocks; or "
        "export with --format static.",
    )


def _whole_layers(model: nn.Module, blocks: Sequence[nn.Module], config: Any) -> Any:
    """A TaylorSeer configuration whose patterns name whole blocks and the layer behind them."""
    last = next(name for name in LAST_LAYERS if hasattr(model, name))
    names = [name for name, module in model.named_modules() if any(module is block for block in blocks)]
    if config.use_lite_mode:
        # diffusers looks for the last layer by one name alone, and would skip the blocks all the same.
        patterns = [re.escape(name) for name in names]
        return replace(
            config, use_lite_mode=False, cache_identifiers=[last], skip_predict_identifiers=patterns
        )
    asked = [*(config.cache_identifiers or ()), *(config.skip_predict_identifiers or ())]
    hooked = [
        name for name, _ in model.named_modules() if any(re.fullmatch(pattern, name) for pattern in asked)
    ]
    wrong = sorted(set(hooked) - {*names, last})
    if hooked and not wrong:
        return config
    raise DyditError(
        f"This {TAYLOR} would hook {wrong[0] if wrong else 'nothing that dynamic execution calls'}.",
        why="By default it hooks attention layers; dynamic execution reads their weights and does not call them.",
        fix=f"Pass use_lite_mode=True, or cache_identifiers such as '{re.escape(names[-1])}' that name blocks or '{last}'.",
    )


def between_cached_blocks(what: str) -> DyditError:
    """The error for what a cache of whole blocks would compute twice, or never see."""
    return DyditError(
        f"{what} do not go together with a step cache.",
        why="The cache reuses what all blocks add together, and does not know what is added or left out between them.",
        fix="Call model.disable_cache() first.",
    )


def _managers(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """What keeps the steps of the caches on some modules."""
    for module in modules:
        # Not by getattr, which a module answers slowly where there is nothing; this is asked once a forward and block.
        registry = vars(module).get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks.values():
            manager = getattr(hook, "state_manager", None)
            if manager is not None:
                yield manager


def is_cached(blocks: Iterable[nn.Module]) -> bool:
    """Whether a step cache decides if blocks run."""
    return next(_managers(blocks), None) is not None


def cache_context(model: Any) -> AbstractContextManager[None]:
    """A context in which caches count steps, unless there are none, or a pipeline has opened one."""
    hooked = model.modules() if model.is_cache_enabled else model.dynamic_blocks
    manager = next(_managers(hooked), None)
    if manager is None:
        return nullcontext()
    try:
        manager.get_state()
    except ValueError:
        opened: AbstractContextManager[None] = model.cache_context("denoising")
        return opened
    return nullcontext()
