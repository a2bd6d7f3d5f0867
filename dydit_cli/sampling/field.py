"""What a sampler asks of a model: one prediction for the whole batch at one time. Everything else is hidden from it.

Labels, guidance, dtype, execution and the counting of what was executed live behind this interface, so a sampler is a few lines
of arithmetic and can be tested on any function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class Field(Protocol):
    """A model with its labels and guidance bound.

    Attributes:
        learned_sigma: Whether the prediction has 2C channels, noise and variance (diffusion only).
        dynamic: Whether its widths change with time.
    """

    @property
    def learned_sigma(self) -> bool:
        """See the class."""
        ...

    @property
    def dynamic(self) -> bool:
        """See the class."""
        ...

    def __call__(self, state: Tensor, time: Tensor) -> Tensor:
        """Predict at ``state`` (B, C, h, w) and the scalar ``time``: noise (and variance), or velocity; fp32."""
        ...

    def frozen(self, time: Tensor) -> Field:
        """The same field with the widths that hold at ``time``, whatever time it is then evaluated at; tokens stay live."""
        ...


class Noise(Protocol):
    """The noise of the batch; see `dydit_cli.sampling.noise.ImageNoise`."""

    def generators(self, step: int) -> list:
        """One fresh generator an image."""
        ...

    def step(self, step: int) -> Tensor:
        """(B, C, h, w) noise of a step."""
        ...


class Integrator(Protocol):
    """A sampler: yields the state after each step; the last one is the sample. Nothing is kept between runs."""

    def __call__(self, field: Field, start: Tensor, steps: int, noise: Noise) -> Iterator[Tensor]:
        """Integrate from the pure noise ``start`` (B, C, h, w; fp32) in ``steps`` steps."""
        ...
