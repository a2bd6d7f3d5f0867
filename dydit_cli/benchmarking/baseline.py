"""diffusers' own DiT as a static baseline: the same size, other weights (time does not depend on them)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dydit_cli.benchmarking.subjects import fill
from dydit_cli.dynamic.gates import Gating
from dydit_cli.dynamic.routing import BlockRouting, Routing
from dydit_cli.execution import Executor
from dydit_cli.families.dynamic_model import DynamicModel


class DiffusersStatic(nn.Module):
    """diffusers' `DiTTransformer2DModel` of a dynamic model's size, called as ours is.

    It stands in for a SiT too, which diffusers does not have: the blocks are the same.

    Args:
        model: Whose size, device and type of numbers are taken.
        seed: Of the weights.
    """

    execution = "static"
    keep_bias = 0.0

    def __init__(self, model: DynamicModel, seed: int) -> None:
        from diffusers import DiTTransformer2DModel

        super().__init__()
        geometry = model.geometry
        self.geometry, self.config, self.family = geometry, model.config, model.family
        self.guided_channels = model.guided_channels
        self.transformer = DiTTransformer2DModel(
            num_attention_heads=geometry.num_heads,
            attention_head_dim=geometry.head_dim,
            in_channels=geometry.in_channels,
            out_channels=geometry.out_channels,
            num_layers=geometry.depth,
            sample_size=geometry.sample_size,
            patch_size=geometry.patch_size,
            num_embeds_ada_norm=geometry.num_classes,
        )
        fill(self.transformer, seed)
        # Past diffusers' own `to`, which warns of modules that it wants in fp32 and has none of here.
        nn.Module.to(self.transformer, device=model.device, dtype=model.dtype)
        self.eval().requires_grad_(False)
        ones = torch.ones(1, 1, device=model.device)
        self._routing = tuple(
            BlockRouting(
                ones.expand(1, geometry.num_heads),
                ones.expand(1, geometry.num_groups),
                ones.expand(1, geometry.num_tokens),
            )
            for _ in range(geometry.depth)
        )

    @property
    def device(self) -> torch.device:
        """Where it is."""
        found: torch.device = self.transformer.device
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        found: torch.dtype = self.transformer.dtype
        return found

    def begin_run(self) -> None:
        """See `DynamicModel`: there is no cache that could remember a run."""

    def denoise(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor,
        *,
        executor: Executor | None = None,
        gating: Gating | None = None,
    ) -> tuple[Tensor, Routing]:
        """Predict; everything is on, whatever is asked."""
        batch = len(hidden_states)
        times = torch.as_tensor(timestep, device=self.device).reshape(-1).expand(batch)
        (sample,) = self.transformer(
            hidden_states.to(self.dtype), timestep=times, class_labels=class_labels, return_dict=False
        )
        routing = Routing(self._routing).map(lambda mask: mask.expand(batch, -1))
        return sample[:, : int(self.config["out_channels"])], routing


def diffusers_baseline(model: DynamicModel, seed: int) -> DiffusersStatic | None:
    """The baseline, or None where diffusers has no such model: its MLPs are always 4C wide, and it has no Latte of this form."""
    geometry = model.geometry
    if geometry.num_frames or geometry.mlp_hidden != 4 * geometry.hidden_size:
        return None
    return DiffusersStatic(model, seed)
