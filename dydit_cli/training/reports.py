"""What a run tells while it goes and when it ends."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepReport:
    """One optimiser step.

    Attributes:
        step: Steps done, this one included.
        loss: What was minimised.
        terms: Its parts: the denoising loss and its own parts, ``ratio_loss`` (unweighted), and ``complete``
            where the complete model trained as well.
        trained_ratio: Mean MACs ratio of the masks that training used, noise included.
        realised_ratio: That of the averaged weights with thresholds, on the same batch, on steps that are logged.
        target: The schedule's target for that ratio.
        learning_rate: The backbone's.
        grad_norm: Norm of all gradients before clipping.
        images_per_second: Of this step, evaluation and checkpoint not counted.
        ema_ratio: The moving average's ratio at evaluation, on steps that measured it.
        ema_loss: Its denoising loss on the same held-out samples.
        checkpoint: The checkpoint written after this step.
        sample: The sample grid written after this step.
        bad_samples: Samples that could not be read so far, under ``on_bad_sample: skip``.
        notes: What the user should be told.
    """

    step: int
    loss: float
    terms: dict[str, float]
    trained_ratio: float
    target: float
    learning_rate: float
    grad_norm: float
    images_per_second: float
    realised_ratio: float | None = None
    ema_ratio: float | None = None
    ema_loss: float | None = None
    checkpoint: Path | None = None
    sample: Path | None = None
    bad_samples: int = 0
    notes: tuple[str, ...] = ()

    def line(self) -> dict[str, Any]:
        """The line of ``metrics.jsonl``."""
        return {
            "step": self.step,
            "loss": self.loss,
            **self.terms,
            "trained_ratio": self.trained_ratio,
            "realised_ratio": self.realised_ratio,
            "target": self.target,
            "ema_ratio": self.ema_ratio,
            "ema_loss": self.ema_loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "images_per_second": self.images_per_second,
            "bad_samples": self.bad_samples,
        }


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run.

    Attributes:
        out: The artifact.
        steps: Steps of the whole run.
        ratio: The moving average's ratio: thresholds, no noise, held-out images.
        ratio_standard_error: Of that mean.
        target_ratio: What was asked for.
        heads, groups, tokens: Shares of active units.
        held_out_loss: The moving average's denoising loss at evaluation.
        held_out_images: Images of both measurements.
        trained_ratio: Mean ratio of the masks that the last steps of this process trained with; None if it trained none.
        uncalibrated_ratio: The realised ratio before the last correction; None where there was none.
        router_shift: What that correction added to all router logits.
        time_ratio: The moving average's time by the latency table, relative to the static model; None where the target is MACs.
        seconds: Time of the training steps of this process.
        images_per_second: Over them; None if this process trained no step.
    """

    out: Path
    steps: int
    ratio: float
    ratio_standard_error: float
    target_ratio: float
    heads: float
    groups: float
    tokens: float
    held_out_loss: float
    held_out_images: int
    seconds: float
    images_per_second: float | None
    trained_ratio: float | None = None
    uncalibrated_ratio: float | None = None
    router_shift: float = 0.0
    time_ratio: float | None = None

    @property
    def targeted(self) -> float:
        """What the target refers to."""
        return self.ratio if self.time_ratio is None else self.time_ratio

    def as_dict(self) -> dict[str, Any]:
        """For the manifest and ``--json``."""
        return {**asdict(self), "out": str(self.out)}
