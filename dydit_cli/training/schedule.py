"""What changes over a run: the target of the MACs ratio (first the complete model, then a ramp down, then the target itself), and
the noise on the routers.
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


def steps_ahead(start: float, final: float, full_width_steps: int, ramp_steps: int) -> int:
    """At which step of the schedule a model stands that was calibrated to a ratio of ``start`` before any training [ours].

    It joins where the target is what it realises, and has the rest of the ramp before it; 0 for the complete model.
    """
    if start >= 1:
        return 0
    if start <= final:
        return full_width_steps + ramp_steps
    return full_width_steps + round(ramp_steps * (1 - start) / (1 - final))


def noise_scale_at(
    gating: str, step: int, full_width_steps: int, ramp_steps: int, anneal_steps: int | None
) -> float:
    """The scale of the routing noise at the (0-based) ``step``.

    Under ``gumbel`` always 1, the paper's rule. Under ``annealed`` 1 until the target has come down, then linear to 0 over
    ``anneal_steps`` (as many as the ramp's if None): from there on, training decides as evaluation does [ours].
    """
    if gating == "gumbel":
        return 1.0
    length = ramp_steps if anneal_steps is None else anneal_steps
    done = step - full_width_steps - ramp_steps
    if done < 0:
        return 1.0
    return max(0.0, 1.0 - done / length) if length else 0.0
