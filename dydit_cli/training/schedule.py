"""The target of the MACs ratio over a run: first the complete model, then a ramp down, then the target
itself.
"""

from __future__ import annotations


def target_at(step: int, final: float, full_width_steps: int, ramp_steps: int) -> float:
    """The target of the (0-based) ``step``.

    1.0 for ``full_width_steps``, then linear to ``final`` over ``ramp_steps``, then ``final`` (released code
    of DyDiT).
    """
    done = step - full_width_steps
    if done < 0:
        return 1.0
    if done >= ramp_steps:
        return final
    return 1.0 + (final - 1.0) * done / ramp_steps
