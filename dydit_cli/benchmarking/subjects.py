"""What runs in a benchmark: a trained model on its data, or a published size with random weights and imposed masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dydit_cli.artifacts import load_model
from dydit_cli.benchmarking.masks import Case, case_for_ratio, case_of, impose
from dydit_cli.benchmarking.settings import BenchSettings
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import require
from dydit_cli.families.registry import family_of, preset_named
from dydit_cli.objectives import Objective, objective_of
from dydit_cli.profiling.inputs import find_inputs
from dydit_cli.randomness import generator, normal

LEVELS = 5
"""Noise levels of a trained model's round: its widths change over the schedule."""

BLOCKS = 2
"""Blocks of a preset's forward: all are alike, and what stands around them is a few per mille of two."""

WEIGHT_SCALE = 0.02


class Inputs(NamedTuple):
    """The inputs of one forward."""

    hidden_states: Tensor
    timestep: Tensor
    class_labels: Tensor


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        model: In eval mode, on its device, in its type of numbers.
        title: For people.
        cases: What is to be imposed, one after the other; a single None where the model's own routers decide.
        masks: ``prefix``, ``scattered``, ``changing``; ``live`` where the model's own routers decide.
        note: Where the inputs come from.
        clean: Samples that inputs are made of, or None for noise.
        labels: Of ``clean``.
        folder: Where the model came from, if from a folder.
    """

    model: DynamicModel
    title: str
    cases: tuple[Case | None, ...]
    masks: str
    note: str
    seed: int
    clean: Tensor | None = None
    labels: Tensor | None = None
    folder: Path | None = None
    _imposed: list[tuple[Case, int]] = field(default_factory=list)

    @property
    def objective(self) -> Objective:
        """Of the model's family."""
        return objective_of(self.model)

    def inputs(self, batch: int) -> list[Inputs]:
        """Inputs of a round's forwards: several noise levels of data, the noisiest first, or noise at one timestep (at several
        where masks change)."""
        geometry, device, objective = self.model.geometry, self.model.device, self.objective
        noise = normal(
            self.seed,
            (batch, *geometry.sample_shape),
            "bench_noise",
        ).to(device)
        if self.clean is None or self.labels is None:
            labels = torch.randint(
                max(1, geometry.num_classes), (batch,), generator=generator(self.seed, "bench_labels")
            ).to(device)
            times = objective.grid(LEVELS if self.masks == "changing" else 1).to(device)
            return [Inputs(noise, time.expand(batch).clone(), labels) for time in times]
        picks = torch.arange(batch) % len(self.clean)
        clean, labels = self.clean[picks].to(device), self.labels[picks].to(device)
        grid = objective.grid(LEVELS)
        grid = grid[objective.noise_level(grid).argsort(descending=True)]
        levels = [torch.full((batch,), float(t), device=device) for t in grid]
        return [Inputs(objective.noised(clean, noise, t), t, labels) for t in levels]

    def impose(self, case: Case | None, batch: int) -> None:
        """Set a preset's routers for a case and a batch size; a trained model's stay as they are."""
        if case is None or self._imposed[-1:] == [(case, batch)]:
            return
        impose(self.model, case, self.masks, self.inputs(batch), self.seed)
        self._imposed[:] = [(case, batch)]


def open_subject(settings: BenchSettings, device: torch.device) -> Subject:
    """Load the model, or build the preset.

    Raises:
        DyditError: If there is no such model or preset, or a mask does not fit it.
    """
    if settings.model is not None:
        return _trained(settings, device)
    family, config = preset_named(str(settings.preset))
    require(family, "dydit bench")
    whole = int(config["num_layers"])
    config["num_layers"] = min(whole, settings.blocks or (BLOCKS if settings.steps is None else whole))
    model = family.build(config)
    fill(model, settings.seed)
    model.eval().requires_grad_(False)
    # Past diffusers' own `to`, which warns of modules that it wants in fp32 and has none of here.
    torch.nn.Module.to(model, device=device, dtype=settings.number_type)
    geometry = model.geometry
    cases: Iterator[Case]
    if settings.ratio:
        cases = (case_for_ratio(geometry, ratio) for ratio in settings.ratio)
    else:
        cases = (
            case_of(geometry, settings.heads, settings.groups, tokens) for tokens in settings.tokens or (1.0,)
        )
    blocks = "all" if geometry.depth == whole else str(geometry.depth)
    return Subject(
        model,
        f"{settings.preset}, {blocks} of {whole} blocks" if blocks != "all" else f"{settings.preset}",
        tuple(cases),
        settings.masks,
        f"random weights, {settings.masks} masks imposed, routers running",
        settings.seed,
    )


def _trained(settings: BenchSettings, device: torch.device) -> Subject:
    folder = Path(str(settings.model)).expanduser()
    model = load_model(folder, torch_dtype=settings.number_type, device=device, convention="native")
    require(family_of(model), "dydit bench")
    wanted = max(settings.batch)
    found = find_inputs(model.geometry, None, folder, wanted, settings.seed)
    indices = list(range(min(wanted, len(found.source))))
    clean = found.source.batch(indices)
    labels = torch.as_tensor(found.source.labels)[indices]
    return Subject(
        model,
        f"{family_of(model).title}, {folder.name}",
        (None,),
        "live",
        found.note,
        settings.seed,
        clean,
        labels,
        folder,
    )


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter small random values that depend on its name alone; models of a size are the same anywhere."""
    for name, parameter in model.named_parameters():
        parameter.copy_(WEIGHT_SCALE * normal(seed, tuple(parameter.shape), "bench_weights", name))


def static_config(model: DynamicModel) -> dict[str, Any]:
    """What names a model's size."""
    geometry = model.geometry
    return {
        "family": model.family,
        "depth": geometry.depth,
        "hidden_size": geometry.hidden_size,
        "num_heads": geometry.num_heads,
        "num_groups": geometry.num_groups,
        "num_tokens": geometry.num_tokens,
    }
