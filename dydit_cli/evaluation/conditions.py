"""Conditions on results, for other programs' pipelines: ``psnr<25`` fails a run whose mean PSNR is below 25 dB."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import ge, gt, le, lt

from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.evaluation.pairs.comparison import CLIP, CLIP_AGAINST, LPIPS, PSNR, SSIM
from dydit_cli.evaluation.scoring import FRECHET, KERNEL, METRICS, SCORE, SPATIAL

ALIASES = {"fid": FRECHET, "sfid": SPATIAL, "kid": KERNEL, "is": SCORE}
PAIRED = (PSNR, SSIM, LPIPS, CLIP, CLIP_AGAINST)
PARTS = ("mean", "median", "worst", "best")
OTHERS = ("ratio",)
SIGNS: dict[str, Callable[[float, float], bool]] = {"<": lt, ">": gt, "<=": le, ">=": ge}

_FORM = re.compile(r"\s*([a-z_]+)(?:\.([a-z]+))?\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True)
class Condition:
    """A condition under which a run fails.

    Attributes:
        text: As written.
        key: ``metric`` or ``metric.part`` as `values_of` names them.
        sign: One of <, >, <=, >=.
        limit: The number.
    """

    text: str
    key: str
    sign: str
    limit: float

    def holds(self, values: Mapping[str, float]) -> bool:
        """Whether the run fails.

        Raises:
            DyditError: If the value was not measured; a gate that measures nothing must not pass.
        """
        if self.key not in values:
            raise DyditError(
                f"The condition '{self.text}' cannot be judged.",
                why=f"{self.key} was not measured in this run.",
                fix=f"Measured are {', '.join(sorted(values))}; paired measures need --against.",
            )
        return SIGNS[self.sign](values[self.key], self.limit)


def read_condition(text: str) -> Condition:
    """Read ``metric<number``, with .mean (the default), .median, .worst or .best for paired measures.

    Raises:
        DyditError: If it is not one.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise _not_one(text, "It has the form metric<number, with <, >, <= or >=.")
    name, part, sign, written = found.groups()
    name = ALIASES.get(name, name)
    known = (*METRICS, *PAIRED, *OTHERS)
    if name not in known:
        raise DyditError(
            f"There is no metric called '{name}'.",
            why=f"The metrics are {', '.join((*known, *ALIASES))}.",
            fix=did_you_mean(name, (*known, *ALIASES)) or "Name one of these.",
        )
    if part is not None and (name not in PAIRED or part not in PARTS):
        raise _not_one(
            text,
            f"Paired measures ({', '.join(PAIRED)}) have {', '.join(PARTS)}; other metrics have no parts.",
        )
    try:
        limit = float(written)
    except ValueError:
        raise _not_one(text, f"'{written}' is not a number.") from None
    key = f"{name}.{part or PARTS[0]}" if name in PAIRED else name
    return Condition(text.strip(), key, sign, limit)


def _not_one(text: str, why: str) -> DyditError:
    return DyditError(
        f"'{text}' is not a condition.",
        why=why,
        fix="Write --fail-if 'psnr<25' or --fail-if 'psnr.worst<18', say.",
    )
