"""Claimed, counted, measured: what a model costs in shares of its static self, each with how it is known."""

from __future__ import annotations

from typing import Any

from dydit_cli.profiling.latency import LatencyReport
from dydit_cli.profiling.profile import ProfileReport


def verdict(report: ProfileReport, target: float | None) -> str:
    """What the numbers say, in a sentence or two.

    Args:
        report: Of `profile`.
        target: Ratio that fine-tuning aimed at, if it was fine-tuned.
    """
    if report.model["execution"] == "static":
        return f"The complete static model executes {amount(report.static_gmacs)} a forward pass."
    aimed = "" if target is None else f" (target {target:.0%})"
    said = (
        f"Of the static model's attention and MLP work, {report.ratio:.1%} is executed{aimed}; of all its "
        f"multiply-accumulates, routers included, {report.total_ratio:.1%}."
    )
    latency = report.latency
    if latency is None:
        return said + " Time was not measured."
    low, high = latency.interval
    return (
        said
        + f" A forward pass of {batch_words(report, latency)} takes {latency.ratio:.2f} of the static model's time "
        f"({low:.2f} to {high:.2f}) on {latency.device}."
    )


def cost_rows(report: ProfileReport, target: float | None) -> list[dict[str, Any]]:
    """The bars: group, name, share of the static model, its interval if there is one, and the amounts in words."""
    if report.model["execution"] == "static":
        return []
    rows: list[dict[str, Any]] = []
    if target is not None:
        rows.append(_row("claimed", "target of fine-tuning", target, "attention and MLP, as asked for"))
    one = "a video" if report.model.get("num_frames") else "an image"
    rows += [
        _row(
            "counted",
            "attention and MLP",
            report.ratio,
            f"by formula, mean over {_images(report)} and {len(report.timesteps)} noise levels",
        ),
        _row(
            "counted",
            "everything",
            report.total_ratio,
            f"{amount(report.gmacs)} of {amount(report.static_gmacs)} {one}, routers included",
        ),
    ]
    if report.trajectory_ratio is not None:
        rows.append(
            _row(
                "counted",
                "along a sampler's way",
                report.trajectory_ratio,
                "attention and MLP, guidance included",
            )
        )
    rows += _counters(report)
    if report.latency is not None:
        rows += _measured(report.latency)
    return rows


def facts_of(report: ProfileReport) -> list[tuple[str, str]]:
    """On which machine and with what the numbers were made."""
    params = report.params
    facts = [
        (
            "parameters",
            f"{params.static / 1e6:,.2f} M, and {params.routers / 1e6:,.2f} M of routers ({params.routers / max(1, params.static):.2%})",
        ),
        (
            "units",
            f"{report.model['num_heads']} heads and {report.model['num_groups']} channel groups a block, "
            f"{report.model['num_tokens']:,} tokens",
        ),
        ("lowest ratio", f"{report.floor:.3f}, which is always on"),
    ]
    if report.inputs is not None:
        facts.append(("seen", str(report.inputs["note"])))
    latency = report.latency
    if latency is None:
        facts.append(("time", "not measured"))
    else:
        how = "compiled blocks" if latency.compiled else "CUDA graphs" if latency.graphs else "eager"
        facts += [
            ("device", latency.device),
            (
                "timed",
                f"{batch_words(report, latency)} a forward, {latency.dtype}, {how}, {plural(latency.threads, 'thread')}, "
                f"{latency.repetitions} interleaved rounds over {len(latency.timesteps)} noise levels",
            ),
            ("memory", latency.memory_method),
        ]
    versions = report.versions
    facts.append(
        (
            "versions",
            ", ".join(
                f"{name} {versions[name]}"
                for name in ("dydit", "torch", "diffusers", "python")
                if name in versions
            ),
        )
    )
    return facts


def amount(gmacs: float) -> str:
    """GMACs in a unit that suits them."""
    return f"{gmacs:,.2f} GMACs" if gmacs >= 1 else f"{gmacs * 1000:,.1f} MMACs"


def plural(count: int, name: str) -> str:
    """A number and its noun."""
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def batch_words(report: ProfileReport, latency: LatencyReport) -> str:
    """How many samples a timed forward has."""
    one = "video" if report.model.get("num_frames") else "image"
    return f"one {one}" if latency.batch == 1 else f"{latency.batch} {one}s"


def _images(report: ProfileReport) -> str:
    count = (report.inputs or {}).get("images") or 0
    real = bool((report.inputs or {}).get("real"))
    return f"{count:,} held-out samples" if real else f"{count:,} samples of noise"


def _counters(report: ProfileReport) -> list[dict[str, Any]]:
    """Of the graph that runs at one noise level, by two public counters."""
    static, compact = report.counted.get("static"), report.counted.get("compact")
    if static is None or compact is None or compact.t is None:
        return []
    return [
        _row(
            "counted",
            f"{name}, at t = {compact.t:.4g}",
            after / before,
            f"{amount(after)} of {amount(before)}, the graph that runs; formula {amount(formula)}",
        )
        for name, after, before, formula in (
            ("by fvcore", compact.fvcore, static.fvcore, compact.formula),
            ("by torch", compact.torch, static.torch, compact.formula_without_layernorm),
        )
    ]


def _measured(latency: LatencyReport) -> list[dict[str, Any]]:
    static = latency.static_ms
    peak = latency.peak_mib
    rows = [
        _row(
            "measured",
            "time, compact",
            latency.ratio,
            f"{milliseconds(latency.compact_ms)} of {milliseconds(static)}",
            latency.interval,
        ),
        _row(
            "measured",
            "time, dense (masks multiplied)",
            latency.dense_ratio,
            f"{milliseconds(latency.dense_ms)} of {milliseconds(static)}",
        ),
    ]
    if peak["static"]:
        rows.append(
            _row(
                "measured",
                "memory beside the weights",
                peak["compact"] / peak["static"],
                f"{peak['compact']:,.1f} of {peak['static']:,.1f} MiB; {latency.packed_mib:,.1f} MiB more of packed weights",
            )
        )
    return rows


def milliseconds(value: float) -> str:
    """A duration with three significant digits."""
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"


def _row(
    group: str, name: str, share: float, words: str, interval: tuple[float, float] | None = None
) -> dict[str, Any]:
    return {
        "group": group,
        "name": name,
        "share": share,
        "words": words,
        "interval": None if interval is None else list(interval),
    }
