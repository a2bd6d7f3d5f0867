"""Convert a FLUX file tensor by tensor and measure the process's own memory and the time.

    python scripts/make_sparse_flux.py flux1-dev.safetensors
    python scripts/measure_streaming.py flux1-dev.safetensors --out converted --json measured.json

What is measured is RssAnon of /proc/self/status: memory that the process owns. Pages of mapped files, which the system drops when
it needs room, are reported beside it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dydit_cli.checkpoints import open_checkpoint
from dydit_cli.checkpoints.lazy import lazily
from dydit_cli.conversion.streaming import Ranking, difference_of, stream_weights
from dydit_cli.dynamic.routers import ChannelRouter, HeadRouter, TokenRouter
from dydit_cli.families.family import Hints
from dydit_cli.families.original_flux import read
from dydit_cli.families.unit_weights import flux_units

INTERVAL_S = 0.02


class MemoryWatch:
    """Samples /proc/self/status from a thread and keeps the largest values, in bytes."""

    def __init__(self) -> None:
        self.before = self._read()
        self.largest = dict(self.before)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            for name, value in self._read().items():
                self.largest[name] = max(self.largest[name], value)

    @staticmethod
    def _read() -> dict[str, int]:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        fields = (line.split() for line in lines)
        return {
            field[0][:-1]: int(field[1]) * 1024 for field in fields if field[0] in ("RssAnon:", "RssFile:")
        }


def routers_of(config: dict[str, object], hidden: int, groups: int) -> dict[str, torch.Tensor]:
    """Width and low-rank token routers of every block at their start."""
    heads = int(str(config["num_attention_heads"]))
    blocks = [(f"transformer_blocks.{index}", 2) for index in range(int(str(config["num_layers"])))]
    blocks += [
        (f"single_transformer_blocks.{index}", 1) for index in range(int(str(config["num_single_layers"])))
    ]
    tensors: dict[str, torch.Tensor] = {}
    for block, streams in blocks:
        modules = {"head_router": HeadRouter(hidden, heads, True), "token_router": TokenRouter(hidden)}
        for name in ("channel_router", "context_channel_router")[:streams]:
            modules[name] = ChannelRouter(hidden, groups, True)
        for name, module in modules.items():
            module.reset_parameters()
            tensors |= {f"{block}.{name}.{key}": value for key, value in module.state_dict().items()}
    return tensors


def main() -> None:
    """Convert, compare, print, and leave no output unless asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; removed afterwards")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--verify", action="store_true", help="read everything again and compare")
    parser.add_argument("--keep", action="store_true", help="keep the output")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    settings = parser.parse_args()
    settings.out.mkdir(parents=True)
    torch.set_grad_enabled(False)
    begin = time.perf_counter()
    with MemoryWatch() as watch:
        source = read(open_checkpoint(settings.checkpoint).tensors, Hints())
        config, tensors = source.config, lazily(source.tensors)
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        hidden, mlp = heads * head_dim, config["mlp_hidden_size"]
        units = flux_units(config["num_layers"], config["num_single_layers"], hidden, heads, mlp)
        opened = time.perf_counter()
        result = stream_weights(
            settings.out,
            tensors,
            Ranking(tuple(units), num_groups=heads),
            routers_of(config, hidden, heads),
            max_shard_size=settings.max_shard_size,
        )
        written = time.perf_counter()
        converting = dict(watch.largest)
        difference = difference_of(settings.out, tensors)[0] if settings.verify else None
    figures = {
        "numbers": sum(spec.numel for spec in tensors.specs.values()),
        "blocks": f"{config['num_layers']} + {config['num_single_layers']}",
        "gb_written": result.nbytes / 1e9,
        "files": len(result.files),
        "open_s": opened - begin,
        "convert_s": written - opened,
        "verify_s": time.perf_counter() - written if settings.verify else None,
        "largest_difference": difference,
        "rss_anon_before_gb": watch.before["RssAnon"] / 1e9,
        "rss_anon_peak_gb": converting["RssAnon"] / 1e9,
        "rss_anon_peak_with_verification_gb": watch.largest["RssAnon"] / 1e9,
        "rss_file_peak_gb": watch.largest["RssFile"] / 1e9,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    print(json.dumps(figures, indent=2))
    if settings.json:
        settings.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if not settings.keep:
        shutil.rmtree(settings.out)


if __name__ == "__main__":
    main()
