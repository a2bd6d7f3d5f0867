"""The objective of DiT: noise prediction over 1,000 linear steps, with a variance learned by the variational
bound.

The model's first C channels predict the noise (mean squared error); the next C interpolate the log variance
of the reverse step between its two analytic bounds (KL divergence to the true posterior, or at t = 0 the
likelihood of 8-bit data; the mean is detached there, so that the bound trains the variance alone). A model
that learned no variance has the squared error only.

Source: Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672), sections 2
and 3, as used by facebookresearch/DiT; checked against its losses in tests/objectives. The weighting by noise
level is that of Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (arXiv 2303.09556),
equation 6 for predicted noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dydit_cli.objectives.timesteps import middles, strata

STEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02
SMALLEST = 1e-12


class DiffusionObjective:
    """Gaussian diffusion as in DiT. Timesteps are whole numbers 0 ... 999, kept as fp32; 999 is nearly
    pure noise.

    Args:
        snr_gamma: γ: squared errors at signal-to-noise ratio r are weighted by min(r, γ) / r, scaled to 1 on average over
            timesteps, so that the ratio's loss keeps its weight. None weights all alike, as the originals do.
    """

    kind = "diffusion"
    num_strata = 4

    def __init__(self, snr_gamma: float | None = None) -> None:
        betas = torch.linspace(BETA_START, BETA_END, STEPS, dtype=torch.float64)
        kept = torch.cumprod(1 - betas, dim=0)
        kept_before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        posterior_variance = betas * (1 - kept_before) / (1 - kept)
        # The posterior's variance at t = 0 is 0; the bound takes its logarithm, so the next value stands in,
        # as in the original.
        floor = torch.cat([posterior_variance[1:2], posterior_variance[1:]])
        tables = {
            "signal": kept.sqrt(),
            "noise": (1 - kept).sqrt(),
            "inverse_signal": (1 / kept).sqrt(),
            "inverse_noise": (1 / kept - 1).sqrt(),
            "posterior_clean": betas * kept_before.sqrt() / (1 - kept),
            "posterior_noisy": (1 - kept_before) * (1 - betas).sqrt() / (1 - kept),
            "log_variance_low": floor.log(),
            "log_variance_high": betas.log(),
        }
        if snr_gamma is not None:
            signal_to_noise = kept / (1 - kept)
            weights = signal_to_noise.clamp(max=snr_gamma) / signal_to_noise
            tables["weight"] = weights / weights.mean()
        self._is_weighted = snr_gamma is not None
        # Made in fp64, used in fp32, as in the original; not every device knows fp64.
        cpu = torch.device("cpu")
        self._tables = {cpu: {name: table.float() for name, table in tables.items()}}

    def for_shape(self, shape: Sequence[int]) -> DiffusionObjective:
        """See `Objective`: all resolutions have the same noise levels."""
        return self

    def draw_timesteps(self, uniforms: Tensor, indices: Sequence[int]) -> Tensor:
        """See `Objective`: floor of the stratified uniform times 1,000."""
        return (strata(uniforms, indices, self.num_strata) * STEPS).floor().clamp(max=STEPS - 1)

    def grid(self, count: int) -> Tensor:
        """See `Objective`."""
        return (middles(count) * STEPS).floor()

    def ratio_weights(self, t: Tensor) -> Tensor | None:
        """See `Objective`: draws are even already."""
        return None

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """See `Objective`: sqrt(a_t) * clean + sqrt(1 - a_t) * noise."""
        return self._at("signal", t, clean) * clean + self._at("noise", t, clean) * noise

    def losses(self, prediction: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """See `Objective`: ``mse``, and with a learned variance ``vb`` in bits a dimension; ``loss`` is their
        sum, in which the squared error is weighted where the objective weights noise levels. The bound is not: it trains
        the variance alone, which no other term does.

        Args:
            prediction: (B, C, h, w), or (B, 2C, h, w) with a learned variance; of videos with the axis of frames before C.
            clean: (B, C, h, w), or (B, F, C, h, w).
            noise: The same shape, what was mixed in.
            t: (B,).
        """
        prediction = prediction.float()
        channels = clean.shape[-3]
        predicted_noise = prediction[..., :channels, :, :]
        mse = _mean_over_sample((predicted_noise - noise) ** 2)
        weighted = mse * self._table("weight", t.device)[t.long()] if self._is_weighted else mse
        if prediction.shape[-3] == channels:
            return {"loss": weighted, "mse": mse}
        vb = self._bound(predicted_noise.detach(), prediction[..., channels:, :, :], clean, noise, t)
        return {"loss": weighted + vb, "mse": mse, "vb": vb}

    def noise_level(self, t: Tensor) -> Tensor:
        """See `Objective`: the standard deviation of the noise in x_t."""
        return self._table("noise", t.device)[t.long()]

    def _bound(
        self, predicted_noise: Tensor, variance: Tensor, clean: Tensor, noise: Tensor, t: Tensor
    ) -> Tensor:
        """The bound's term at t, (B,), in bits a dimension."""

        def at(name: str) -> Tensor:
            return self._at(name, t, clean)

        noisy = self.noised(clean, noise, t)
        share = (variance + 1) / 2
        log_variance = share * at("log_variance_high") + (1 - share) * at("log_variance_low")
        predicted_clean = at("inverse_signal") * noisy - at("inverse_noise") * predicted_noise
        mean = at("posterior_clean") * predicted_clean + at("posterior_noisy") * noisy
        true_mean = at("posterior_clean") * clean + at("posterior_noisy") * noisy
        divergence = _mean_over_sample(_normal_kl(true_mean, at("log_variance_low"), mean, log_variance))
        likelihood = _mean_over_sample(-_byte_log_likelihood(clean, mean, 0.5 * log_variance))
        return torch.where(t == 0, likelihood, divergence) / math.log(2)

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Values of a table at (B,) timesteps, to be broadcast over samples."""
        return self._table(name, t.device)[t.long()].view(-1, *[1] * (like.dim() - 1))

    def _table(self, name: str, device: torch.device) -> Tensor:
        """A table on ``device``; copied there once."""
        if device not in self._tables:
            on_cpu = self._tables[torch.device("cpu")]
            self._tables[device] = {key: table.to(device) for key, table in on_cpu.items()}
        return self._tables[device][name]


def _mean_over_sample(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)


def _normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL divergence of two normal distributions, elementwise, in nats."""
    return 0.5 * (
        -1
        + other_log_variance
        - log_variance
        + torch.exp(log_variance - other_log_variance)
        + (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    )


def _normal_cdf(values: Tensor) -> Tensor:
    """The original's fast approximation of the standard normal's distribution function."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)))


def _byte_log_likelihood(clean: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Log probability of 8-bit values scaled to [-1, 1] under a normal distribution cut into 256 bins;
    elementwise, in nats.
    """
    distance = clean - mean
    precision = torch.exp(-log_deviation)
    above = _normal_cdf(precision * (distance + 1 / 255))
    below = _normal_cdf(precision * (distance - 1 / 255))
    inside = (above - below).clamp(min=SMALLEST).log()
    # The outermost bins reach to infinity.
    lowest = above.clamp(min=SMALLEST).log()
    highest = (1 - below).clamp(min=SMALLEST).log()
    return torch.where(clean < -0.999, lowest, torch.where(clean > 0.999, highest, inside))
