"""Classifier-free guidance: how it mixes two predictions, and the model with labels and guidance bound as samplers see it.

Source: ``forward_with_cfg`` of facebookresearch/DiT and willisma/SiT, which guides the first three channels only, and of
Vchitect/Latte, which guides the first four. A learned variance is never guided.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from dydit_cli.dynamic.gates import FrozenWidthGating, ThresholdGating
from dydit_cli.dynamic.routing import Routing
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.resolution import geometry_of
from dydit_cli.families.text_condition import Condition, TextCondition
from dydit_cli.flops import executed_ratio

GUIDED_FIRST = 3
GUIDED_CHOICES = ("original", "first3", "all")


@dataclass(frozen=True)
class Guidance:
    """The strength of guidance and what it acts on.

    Attributes:
        scale: 1 is the plain conditional model and runs one branch; 0 is the unconditional one.
        channels: ``original`` (as many noise channels as the family's original guides), ``first3`` (the first min(3, C)) or
            ``all`` (all C, as diffusers' pipelines).
    """

    scale: float = 1.0
    channels: str = "original"

    @property
    def branches(self) -> int:
        """Forward rows an image: the unconditional branch is run only where it is mixed in."""
        return 1 if self.scale == 1 else 2

    def combine(
        self, conditional: Tensor, unconditional: Tensor, noise_channels: int, original: int = GUIDED_FIRST
    ) -> Tensor:
        """Mix two predictions; channels that are not guided are the conditional ones.

        Args:
            conditional: (B, C or 2C, h, w), or of videos (B, F, C or 2C, h, w).
            unconditional: The same.
            noise_channels: C.
            original: How many channels the family's original guides.
        """
        limits = {"original": original, "first3": GUIDED_FIRST, "all": noise_channels}
        guided = min(limits[self.channels], noise_channels)
        mixed = conditional.clone()
        start = unconditional[..., :guided, :, :]
        mixed[..., :guided, :, :] = start + self.scale * (conditional[..., :guided, :, :] - start)
        return mixed


@dataclass
class RatioMeter:
    """Sums up what was executed for each image of a batch, over evaluations and branches.

    Attributes:
        total: (B,) sum of ratios; stays on the device, so that counting never waits for it.
        evaluations: Calls of the model.
    """

    total: Tensor | float = 0.0
    evaluations: int = 0

    def add(self, ratios: Tensor) -> None:
        """Add one evaluation's (B,) ratios."""
        self.total = self.total + ratios
        self.evaluations += 1

    def mean(self, batch: int) -> Tensor:
        """(B,) mean ratio of each image, on the CPU."""
        if isinstance(self.total, float):
            return torch.ones(batch)
        return (self.total / self.evaluations).cpu()


@dataclass(frozen=True)
class GuidedField:
    """A dynamic model with labels and guidance bound: what `dydit_cli.sampling.field.Field` asks for.

    States and predictions are fp32 whatever the model's dtype, because samplers add up many small differences.

    Attributes:
        model: In eval mode; runs in its own execution.
        labels: (B,) class labels on the model's device, or texts, which no guidance of ours acts on.
        guidance: Its strength.
        meter: Told what each evaluation executed.
        widths: Imposed widths of one sample, for all; None asks the routers.
    """

    model: DynamicModel
    labels: Condition
    guidance: Guidance
    meter: RatioMeter = field(default_factory=RatioMeter)
    widths: Routing | None = None

    @property
    def learned_sigma(self) -> bool:
        """Whether predictions hold a variance beside each channel."""
        return int(self.model.config["out_channels"]) == 2 * self.model.geometry.in_channels

    @property
    def dynamic(self) -> bool:
        """Whether routers decide anything."""
        return self.model.execution != "static"

    @cached_property
    def labels_of_both(self) -> Tensor:
        """(2B,) the labels and as many null classes; one tensor for the whole run, which the engine recognises."""
        if isinstance(self.labels, TextCondition):
            raise TypeError("a model of texts has no null class")
        return torch.cat([self.labels, torch.full_like(self.labels, self.model.geometry.num_classes)])

    def frozen(self, time: Tensor) -> GuidedField:
        """See `Field`."""
        return replace(self, widths=self.model.routing(time.reshape(1)))

    @torch.no_grad()
    def __call__(self, state: Tensor, time: Tensor) -> Tensor:
        """See `Field`; ``time`` may also be (B,). Both branches run in one forward."""
        # A scalar stays where it is: on the host, finding it in a plan waits for nothing.
        if self.guidance.branches == 1:
            return self._predict(state, time, self.labels)
        times = time if time.dim() == 0 else time.repeat(2)
        both = self._predict(torch.cat([state, state]), times, self.labels_of_both)
        conditional, unconditional = both.chunk(2)
        return self.guidance.combine(conditional, unconditional, state.shape[-3], self.model.guided_channels)

    def _predict(self, states: Tensor, times: Tensor, labels: Condition) -> Tensor:
        gating = ThresholdGating(self.model.keep_bias)
        if self.widths is None:
            prediction, routing = self.model.denoise(states, times, labels, gating=gating)
        else:
            widths = self.widths.map(lambda mask: mask.expand(len(states), -1))
            prediction, routing = self.model.denoise(
                states, times, labels, gating=FrozenWidthGating(widths, gating)
            )
        ratios = executed_ratio(routing, geometry_of(self.model.geometry, states.shape, labels))
        self.meter.add(ratios.unflatten(0, (-1, len(self.labels))).mean(dim=0))
        return prediction.float()
