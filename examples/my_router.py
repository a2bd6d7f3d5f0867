"""A plug-in: width routers that read the timestep embedding at unit scale, a ranking by absolute sums, and a baseline."""

import torch
import torch.nn.functional as F

from dydit_cli.conversion.importance import Importance
from dydit_cli.dynamic.routers import ChannelRouter, HeadRouter
from dydit_cli.training.deciding import Deciding, keep_on, routers_of


class UnitScale:
    def forward(self, time_embedding):
        return super().forward(F.layer_norm(time_embedding.float(), time_embedding.shape[-1:]))


class UnitHeadRouter(UnitScale, HeadRouter): ...


class UnitChannelRouter(UnitScale, ChannelRouter): ...


def absolute_sums(model, request):
    shape = (model.geometry.num_heads, -1)
    heads = [block.attn.proj.weight.abs().sum(0).view(shape).sum(1) for block in model.dynamic_blocks]
    channels = [block.mlp.fc2.weight.abs().sum(0) for block in model.dynamic_blocks]
    return Importance(torch.stack(heads).detach(), torch.stack(channels).detach(), "l1", {})


def heads_alone(beginning):
    for name, router, _ in routers_of(beginning.model):
        if not name.endswith("head_router"):
            keep_on(router)


def register(plugin):
    plugin.add_width("unit", UnitHeadRouter, UnitChannelRouter)
    plugin.add_ranking("l1", absolute_sums)
    plugin.add_routers(Deciding("heads", "heads alone are dynamic", heads_alone, tokens=False))
