"""The objective of SiT: the velocity of a straight line from noise (t = 0) to data (t = 1).

Source: Ma et al., "SiT" (arXiv 2401.08740), linear path and velocity prediction, as in willisma/SiT; checked
against its losses in tests/objectives.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dydit_cli.objectives.timesteps import middles, strata


class FlowObjective:
    """x_t = t * clean + (1 - t) * noise, v = clean - noise, t in [0, 1]."""

    kind = "flow"
    num_strata = 4

    def for_shape(self, shape: Sequence[int]) -> FlowObjective:
        """See `Objective`: all resolutions have the same noise levels."""
        return self

    def draw_timesteps(self, uniforms: Tensor, indices: Sequence[int]) -> Tensor:
        """See `Objective`."""
        return strata(uniforms, indices, self.num_strata)

    def grid(self, count: int) -> Tensor:
        """See `Objective`."""
        return middles(count)

    def ratio_weights(self, t: Tensor) -> Tensor | None:
        """See `Objective`: draws are even already."""
        return None

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See `Objective`."""
        time = t.view(-1, *[1] * (clean.dim() - 1))
        return time * clean + (1 - time) * noise

    def losses(self, prediction: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """See `Objective`: the mean squared error of the velocity."""
        mse = ((prediction.float() - (clean - noise)) ** 2).flatten(1).mean(dim=1)
        return {"loss": mse, "mse": mse}

    def noise_level(self, t: Tensor) -> Tensor:
        """See `Objective`: the weight of the noise."""
        return 1 - t
