"""A budget written into the routers' biases: a program runs at one, and has no word for it."""

from __future__ import annotations

import torch

from dydit_cli.dynamic.routers import TokenRouter, WidthRouter, fp32_linear
from dydit_cli.errors import DyditError
from dydit_cli.families.backbone import DynamicTransformer
from dydit_cli.families.dynamic_model import DynamicModel


@torch.no_grad()
def settle_budget(model: DynamicModel) -> None:
    """Make a model with budgets one that knows only the budget it runs at; others stay as they are.

    A budget adds an embedding to what linear width routers read, a number to the token logits of each block, and one to all
    logits: all three are biases, so that decisions stay what they were, up to rounding.

    Raises:
        DyditError: For routers of a plug-in, which may not be linear.
    """
    if not isinstance(model, DynamicTransformer) or model.budget_router is None:
        return
    told = model.budget_router(model.budget if model.budget is not None else model.budget_router.high)
    for block, tokens in zip(model.dynamic_blocks, told.tokens, strict=True):
        for router in (block.head_router, block.channel_router):
            if not isinstance(router, WidthRouter):
                raise DyditError(
                    "A model with budgets and routers of a plug-in cannot be written as a program.",
                    why="A budget becomes part of the routers' biases, and nothing is known of these routers.",
                    fix="Use the diffusers format, or train without budgets.",
                )
            linear = router.linear
            without = fp32_linear(linear, torch.zeros_like(told.embedding)[None])
            linear.bias.add_((fp32_linear(linear, told.embedding[None]) - without)[0].to(linear.bias.dtype))
            router.shift(float(told.shift))
        token_router: TokenRouter = block.token_router
        token_router.shift(float(told.shift + tokens))
    model.budget_router = None
