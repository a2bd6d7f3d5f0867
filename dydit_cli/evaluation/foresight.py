"""What an evaluation would read and measure, without sampling anything: `dydit evaluate --dry-run`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dydit_cli.evaluation.inputs.model import ModelImages
from dydit_cli.evaluation.opening import open_evaluation
from dydit_cli.evaluation.reference import check_reference
from dydit_cli.evaluation.settings import EvaluationSettings

DISTANCES = "Fréchet distance, sFID, KID, precision and recall"


@dataclass(frozen=True)
class EvaluationForesight:
    """What would be measured.

    Attributes:
        subject: Path of what is evaluated. kind: ``model``, or what kind of images lie there.
        images: How many.
        against: The other side of the pairs. reference: What distances are to. extractor: The network. Each None without.
        measures: What would be measured.
        sampling: How a model is asked, in words; None of images that are there.
        device: Where it would run.
    """

    subject: str
    kind: str
    images: int
    against: str | None
    reference: str | None
    extractor: str | None
    measures: tuple[str, ...]
    sampling: str | None
    device: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def foresee(
    subject: str | Path, settings: EvaluationSettings, *, out: str | Path | None, overwrite: bool
) -> EvaluationForesight:
    """Open what an evaluation would read. The arguments are those of `dydit_cli.evaluation.evaluate.evaluate`.

    Raises:
        DyditError: For whatever would end it before it samples.
    """
    opened = open_evaluation(subject, settings, out=out, overwrite=overwrite)
    source, extractor = opened.source, opened.extractor
    if opened.reference is not None and extractor is not None:
        check_reference(opened.reference, extractor, settings.videos)
    measures = []
    if extractor is not None:
        measures.append("inception score")
        if opened.reference is not None:
            measures.insert(0, DISTANCES)
    if opened.against is not None:
        measures.append("PSNR and SSIM of pairs")
        measures += [name.upper() for name in ("lpips", "clip") if getattr(settings, name) is not None]
    asked = opened.settings.sampling
    sampling = None
    if isinstance(source, ModelImages):
        sampling = (
            f"{source.sampler}, {asked.steps} steps, guidance {source.settings.guidance:g}, seed {asked.seed}, {asked.execution} "
            f"execution, {asked.dtype}"
        )
    return EvaluationForesight(
        subject=str(opened.path),
        kind=str(source.describe()["kind"]),
        images=len(source),
        against=None if opened.against is None else opened.against.name,
        reference=opened.reference,
        extractor=None if extractor is None else extractor.title,
        measures=tuple(measures),
        sampling=sampling,
        device=str(opened.device),
    )
