"""What a benchmark is asked to measure, checked before any work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.execution.graphs import require_cuda

CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class BenchSettings:
    """What to measure, and how.

    Attributes:
        model: Folder of a model, whose routers decide; or
        preset: a published size with random weights, whose routers are set to impose masks.
        blocks: Blocks of a preset; None is 2 for forwards (they are all alike) and all for sampling runs.
        batch: Images of a forward or a sampling run.
        heads, groups: Active units of every block, None for all of them; for presets.
        tokens: Shares of tokens that enter the MLP, None for all of them; for presets.
        ratio: Shares of attention and MLP MACs instead of heads, groups and tokens; empty for none.
        masks: ``prefix``: the most important units are on; ``scattered``: others too, the same at every step; ``changing``:
            scattered anew at each of five timesteps.
        steps: None times forwards; a number times whole sampling runs of so many steps.
        guidance: Of sampling runs.
        pairs: Rounds, each of which runs every side once.
        threads: Of torch on the CPU; 0 leaves them as they are.
        clock: ``cpu`` (this process's processor time), ``wall``, or ``auto``: cpu with one thread on a CPU, wall otherwise.
        dense: Also time dense execution.
        compile: Also time static and compact compiled.
        graphs: Also time static and compact as CUDA graphs.
        token_capacity: Room for this share of the tokens in the MLPs of compact execution, so that shapes are static.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        seed: Of weights, masks, inputs, and of the intervals' resampling.

    Raises:
        DyditError: For what cannot be.
    """

    model: str | None = None
    preset: str | None = None
    blocks: int | None = None
    batch: tuple[int, ...] = (1, 4)
    heads: int | None = None
    groups: int | None = None
    tokens: tuple[float, ...] | None = None
    ratio: tuple[float, ...] = ()
    masks: str = "scattered"
    steps: int | None = None
    guidance: float = 1.5
    pairs: int = 31
    threads: int = 1
    clock: str = "auto"
    dense: bool = True
    compile: bool = False
    graphs: bool = False
    token_capacity: float | None = None
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what needs no model."""
        if (self.model is None) == (self.preset is None):
            raise DyditError(
                "A benchmark runs either a model or a preset"
                + (", not both." if self.model else "; neither is given."),
                why="A model's routers decide what is on; a preset has random weights and imposed masks.",
                fix="Pass --model FOLDER or --preset dit-xl/2.",
            )
        counts = {"batch": min(self.batch, default=0), "pairs": self.pairs, "threads": self.threads + 1}
        counts |= {
            name: value
            for name, value in (("blocks", self.blocks), ("steps", self.steps))
            if value is not None
        }
        for name, value in counts.items():
            if value < 1:
                raise DyditError(
                    f"--{name} is too small.",
                    why="There is nothing to measure.",
                    fix=f"Pass --{name} 1, or more.",
                )
        capacity = () if self.token_capacity is None else (self.token_capacity,)
        for name, shares in (
            ("tokens", self.tokens or ()),
            ("ratio", self.ratio),
            ("token-capacity", capacity),
        ):
            for share in shares:
                if not 0 <= share <= 1:
                    raise DyditError(
                        f"A share of {share:g} for --{name} is not possible.",
                        why="It lies between 0 (nothing) and 1 (everything).",
                        fix=f"Pass --{name} 0.7, say.",
                    )
        choices: dict[str, tuple[str, ...]] = {
            "masks": ("scattered", "prefix", "changing"),
            "clock": ("auto", *CLOCKS),
            "dtype": ("float32", "bfloat16", "float16"),
        }
        for name, known in choices.items():
            chosen = getattr(self, name)
            if chosen not in known:
                raise DyditError(
                    f"'{chosen}' is not a choice for --{name}.",
                    why=f"The choices are {', '.join(known)}.",
                    fix=did_you_mean(chosen, known) or "Pass one of them.",
                )
        if self.masks == "changing" and self.steps is not None:
            raise DyditError(
                "--masks changing does not go with --steps.",
                why="Random weights can be given a mask of their own at a few timesteps, not along a whole schedule.",
                fix="Leave out --steps to time forwards, or pass --masks scattered.",
            )
        if self.model is not None:
            given = [
                name
                for name in ("blocks", "heads", "groups", "tokens", "ratio")
                if getattr(self, name) not in (None, ())
            ]
            if given:
                raise DyditError(
                    f"--{given[0]} does not go with --model.",
                    why="What a model executes is decided by its own routers.",
                    fix=f"Leave out --{given[0]}, or pass a preset with --preset.",
                )

    @property
    def number_type(self) -> torch.dtype:
        """The dtype of weights and activations."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def check_device(self, device: torch.device) -> None:
        """Raise a `DyditError` if a device cannot run what is asked."""
        if self.graphs:
            require_cuda(device)

    def clock_name(self, device: torch.device) -> str:
        """``cpu`` or ``wall``.

        Raises:
            DyditError: If processor time would miss the work of another device.
        """
        if self.clock == "auto":
            return "cpu" if device.type == "cpu" and self.threads == 1 else "wall"
        if self.clock == "cpu" and device.type != "cpu":
            raise DyditError(
                f"Processor time does not measure a {device.type} device.",
                why="It counts what this process does on the CPU.",
                fix="Leave out --clock, or pass --clock wall.",
            )
        return self.clock
