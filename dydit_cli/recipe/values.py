"""How a written value becomes a typed one, the same way in a YAML file, after `key=` and as an option.

A plain YAML scalar reaches the schema as the text that was written, so that YAML's own guesses do no harm: `1e-3` (text to
YAML) is a number here, `mixed_precision: no` (a boolean to YAML) stays `no`, and `out: 007` stays `007`.
Each function is a pydantic "before" validator and raises `ValueError` with a message that ends a line of a mistake report.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_INFINITIES = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf}
_TRUE = {"true", "yes", "on"}
_FALSE = {"false", "no", "off"}


def shown(value: object) -> str:
    """Return `value` as a mistake report shows it: quoted text, shortened when long."""
    text = repr(str(value)) if isinstance(value, str | Path) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def whole(value: object) -> int:
    """Read a whole number; `2e5` and `200_000` are whole numbers too, `true` and `0.5` are not."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    try:
        number = real(value)
    except ValueError:
        raise ValueError(f"must be a whole number, got {shown(value)}") from None
    if not number.is_integer():
        raise ValueError(f"must be a whole number, got {shown(value)}")
    return int(number)


def real(value: object) -> float:
    """Read a number. Infinities are left to the field's range, not-a-number is refused."""
    if isinstance(value, str):
        text = value.strip().lower()
        try:
            number = _INFINITIES[text] if text in _INFINITIES else float(text)
        except ValueError:
            raise ValueError(f"must be a number, got {shown(value)}") from None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            raise ValueError(f"must be a number of ordinary size, got {shown(value)}") from None
    else:
        raise ValueError(f"must be a number, got {shown(value)}")
    if math.isnan(number):
        raise ValueError("must be a number, got not-a-number (nan)")
    return number


def flag(value: object) -> bool:
    """Read true or false (also yes/no, on/off)."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError(f"must be true or false, got {shown(value)}")


def text(value: object) -> str:
    """Read non-empty text: a name or a path."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise ValueError(f"must be text, got {shown(value)}")
    written = str(value)
    if not written.strip():
        raise ValueError("must not be empty")
    if "\0" in written:
        raise ValueError("must not contain a zero byte")
    return written


def location(value: object) -> str:
    """Read a path or the name of something packaged; `~` becomes the home folder.

    Relative paths are kept: they refer to the folder in which the command runs, not to the recipe's own.
    """
    written = text(value)
    if not written.startswith("~"):
        return written
    try:
        return str(Path(written).expanduser())
    except RuntimeError:
        raise ValueError(f"names a home folder that does not exist, got {shown(written)}") from None


def names(value: object) -> tuple[str, ...]:
    """Read names: `[mp4, gif]`, `mp4,gif` or a single one; which names there are is the field's own matter."""
    items = value.strip().strip("[]").split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError(f"must be names like mp4,gif, got {shown(value)}")
    found = tuple(str(item).strip() for item in items if str(item).strip())
    if not found:
        raise ValueError("must name at least one")
    return found


def labels(value: object) -> tuple[int, ...]:
    """Read labels, which are whole numbers from 0: `[0, 1]`, `0,1` or a single one."""
    if isinstance(value, str):
        items: list[Any] = [item for item in value.strip().strip("[]").split(",") if item.strip()]
    elif isinstance(value, list | tuple):
        items = list(value)
    else:
        items = [value]
    if not items:
        raise ValueError("must name at least one label")
    try:
        numbers = tuple(whole(item) for item in items)
    except ValueError:
        raise ValueError(f"must be whole numbers like 0,1,2, got {shown(value)}") from None
    if min(numbers) < 0:
        raise ValueError(f"must not be negative, got {shown(value)}")
    return numbers


def shares(value: object) -> tuple[float, ...]:
    """Read shares: `[0.3, 1.0]`, `0.3,1.0` or a single one."""
    items = value.strip().strip("[]").split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError(f"must be numbers like 0.3,1.0, got {shown(value)}")
    found = tuple(real(item) for item in items)
    if not all(0 < number <= 1 for number in found):
        raise ValueError(f"must be above 0 and at most 1, got {shown(value)}")
    return found


def flag_or_labels(value: object) -> bool | tuple[int, ...]:
    """Read true, false or a list of labels."""
    try:
        return flag(value)
    except ValueError:
        pass
    try:
        return labels(value)
    except ValueError:
        raise ValueError(f"must be true, false or labels like 5,7,9, got {shown(value)}") from None


Whole = Annotated[int, BeforeValidator(whole)]
Count = Annotated[int, BeforeValidator(whole), Field(ge=1)]
NonNegative = Annotated[int, BeforeValidator(whole), Field(ge=0)]
Seed = Annotated[int, BeforeValidator(whole), Field(ge=0, lt=2**63)]
Real = Annotated[float, BeforeValidator(real), Field(allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(real), Field(gt=0, allow_inf_nan=False)]
NonNegativeReal = Annotated[float, BeforeValidator(real), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(real), Field(gt=0, le=1)]
Probability = Annotated[float, BeforeValidator(real), Field(ge=0, lt=1)]
Dial = Annotated[float, BeforeValidator(real)]
Flag = Annotated[bool, BeforeValidator(flag)]
Text = Annotated[str, BeforeValidator(text)]
Location = Annotated[str, BeforeValidator(location)]
OutFolder = Annotated[Path, BeforeValidator(location)]
Sides = Annotated[tuple[int, ...], BeforeValidator(labels)]
Budgets = Annotated[tuple[float, ...], BeforeValidator(shares)]
Labels = Annotated[tuple[int, ...], BeforeValidator(labels)]
Mirror = Annotated[bool | tuple[int, ...], BeforeValidator(flag_or_labels)]
