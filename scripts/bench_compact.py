"""How much of the time that the masks could save does compact execution save? DiT-XL/2-sized blocks, imposed masks.

    python scripts/bench_compact.py                       # batch 4, 2 blocks, 8 of 16 heads, 11 of 16 groups, 70 % of tokens
    python scripts/bench_compact.py --batch 8 --masks prefix --pairs 31

Static and compact execution of the same blocks run in turn, in an order that alternates, on one thread; what counts is this
process's CPU time, so that a busy machine does little harm. Printed are the ideal (the ratio of multiply-accumulates, routers and
adaLN included), the median of the paired time ratios with its bootstrap interval, and the efficiency: ideal / realised.

The masks are imposed, but the routers run all the same: their cost is part of what a dynamic model pays.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

# Threads are set before torch is imported, so that its libraries see them.
THREADS = "1"
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = THREADS
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from dydit_cli.dynamic.gates import CompleteGating, Gating, ImposedGating
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import BlockRouting, Routing
from dydit_cli.execution import CompactExecutor, DenseExecutor, Executor, StaticExecutor
from dydit_cli.families.blocks import DynamicDiTBlock
from dydit_cli.flops import macs_of
from dydit_cli.profiling.timing import interleaved, paired_ratio

HIDDEN, HEADS, TOKENS = 1152, 16, 256


def geometry_of(blocks: int) -> Geometry:
    """DiT-XL/2 at 256 pixels with fewer blocks."""
    return Geometry(
        hidden_size=HIDDEN,
        depth=blocks,
        num_heads=HEADS,
        num_groups=HEADS,
        mlp_hidden=4 * HIDDEN,
        num_tokens=TOKENS,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        sample_size=32,
        num_classes=1000,
    )


def chosen(units: int, on: int, scattered: bool, seed: int) -> Tensor:
    """A (units,) mask with ``on`` ones: a prefix, or unit 0 and others at random."""
    order = torch.arange(units)
    if scattered:
        order[1:] = 1 + torch.randperm(units - 1, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(units).index_fill(0, order[:on], 1.0)


def imposed(geometry: Geometry, options: argparse.Namespace) -> Routing:
    """Masks of every block: the same widths for the whole batch, tokens at random for each image."""
    scattered = options.masks == "scattered"
    blocks = []
    for index in range(geometry.depth):
        heads = chosen(geometry.num_heads, options.heads, scattered, seed=3 * index)
        groups = chosen(geometry.num_groups, options.groups, scattered, seed=3 * index + 1)
        draws = torch.rand(options.batch * TOKENS, generator=torch.Generator().manual_seed(3 * index + 2))
        kept = round(options.tokens * options.batch * TOKENS)
        tokens = torch.zeros(options.batch * TOKENS).index_fill(0, draws.argsort()[:kept], 1.0)
        blocks.append(
            BlockRouting(
                heads.expand(options.batch, -1),
                groups.expand(options.batch, -1),
                tokens.view(options.batch, -1),
            )
        )
    return Routing(tuple(blocks))


class Stack:
    """Blocks with their inputs, run as the backbone runs them."""

    def __init__(self, geometry: Geometry, batch: int) -> None:
        torch.manual_seed(0)
        self.blocks = [
            DynamicDiTBlock(HIDDEN, HEADS, geometry.mlp_hidden, geometry.num_groups, always_on=True).eval()
            for _ in range(geometry.depth)
        ]
        self.tokens = torch.randn(batch, TOKENS, HIDDEN)
        self.condition = torch.randn(batch, HIDDEN)
        self.timestep = torch.full((batch,), 500.0)

    @torch.no_grad()
    def run(self, executor: Executor, gating: Gating) -> Tensor:
        """One forward pass of all blocks, (B, N, C)."""
        tokens = self.tokens
        widths = executor.widths(self.blocks, self.timestep, self.condition, gating)
        for index, (block, width) in enumerate(zip(self.blocks, widths, strict=True)):
            tokens, _ = block(tokens, self.condition, width, executor, gating, index)
        return tokens


def block_macs(geometry: Geometry, routing: Routing | None) -> float:
    """MACs an image of the blocks alone, adaLN and (unless static) routers included."""
    report = macs_of(geometry, routing)
    adaln = 6.0 * geometry.depth * geometry.hidden_size**2
    return report.routed + adaln + report.routers


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8, help=f"active heads of {HEADS}")
    parser.add_argument("--groups", type=int, default=11, help=f"active groups of {HEADS}")
    parser.add_argument("--tokens", type=float, default=0.7, help="share of tokens that enter the MLP")
    parser.add_argument("--masks", choices=("scattered", "prefix"), default="scattered")
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(int(THREADS))
    geometry = geometry_of(options.blocks)
    stack = Stack(geometry, options.batch)
    routing = imposed(geometry, options)
    static, compact = StaticExecutor(), CompactExecutor()
    seconds = interleaved(
        {
            "static": lambda: stack.run(static, CompleteGating()),
            "compact": lambda: stack.run(compact, ImposedGating(routing)),
        },
        options.pairs,
        clock=time.process_time,
        warmups=2,
    )
    dense = stack.run(DenseExecutor(), ImposedGating(routing))
    difference = float((stack.run(compact, ImposedGating(routing)) - dense).abs().max() / dense.abs().max())
    ideal = block_macs(geometry, routing) / block_macs(geometry, None)
    found = paired_ratio(seconds["compact"], seconds["static"])
    medians = {name: float(torch.tensor(values).median()) * 1000 for name, values in seconds.items()}
    result = {
        **{name: value for name, value in vars(options).items() if name != "json"},
        "ideal": round(ideal, 4),
        "ratio": round(found.ratio, 4),
        "interval": [round(found.low, 4), round(found.high, 4)],
        "efficiency": round(ideal / found.ratio, 3),
        "static_ms": round(medians["static"], 1),
        "compact_ms": round(medians["compact"], 1),
        "difference_to_dense": difference,
        "torch": torch.__version__,
    }
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{options.blocks} blocks of DiT-XL/2 size, batch {options.batch}, {options.masks} masks, one thread, CPU time"
    )
    print(
        f"  on           {options.heads}/{HEADS} heads, {options.groups}/{HEADS} groups, {options.tokens:.0%} of tokens"
    )
    print(f"  static       {medians['static']:8.1f} ms")
    print(f"  compact      {medians['compact']:8.1f} ms")
    print(f"  ideal        {ideal:8.3f}   (multiply-accumulates)")
    print(
        f"  time ratio   {found.ratio:8.3f}   [{found.low:.3f}, {found.high:.3f}], median of {found.pairs} pairs"
    )
    print(f"  efficiency   {ideal / found.ratio:8.2f}")
    print(
        f"  against dense execution of the same masks, the largest difference is {difference:.1e} of the largest value"
    )


if __name__ == "__main__":
    main()
