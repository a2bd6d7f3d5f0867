"""Train the small Latte that the package ships, with the project's own `finetune`: python scripts/train_small_latte.py --data FOLDER

    FOLDER: the four original IDX files of Fashion-MNIST; their garments drift over 8 frames of 32x32 (moving-fashion-mnist).

As Latte's authors do, it starts from a trained DiT: the spatial blocks are those of the shipped DiT, the temporal ones are new,
with gates of zero, so that the first step makes eight still frames that do not know of each other. `--init random` starts from
nothing instead. `finetune` has a constant learning rate; the rate falls from phase to phase, each a run of its own that goes on
from the one before and can be stopped and resumed. An hour and a half on one CPU core that has nothing else to do
and knows bf16.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from dydit_cli.artifacts import artifact_folder, atomic_write, load_model, save_model
from dydit_cli.checkpoints import read_checkpoint
from dydit_cli.checkpoints.builtin import builtin_path
from dydit_cli.conversion.convert import convert
from dydit_cli.conversion.insertion import is_ours
from dydit_cli.families.latte import DyLatteTransformer3DModel
from dydit_cli.recipe.schema import FinetuneSection
from dydit_cli.training import prepare

FRAMES, HEADS = 8, 8
EMBEDDING_BASE = 10000.0
SEED = 0
Precision = Literal["no", "bf16"]


@dataclass(frozen=True)
class Phase:
    """A run of `finetune`: its steps and their videos, its learning rate, and the decay of its average."""

    steps: int
    batch_size: int
    learning_rate: float
    ema_decay: float


PHASES = (
    Phase(1500, 16, 1e-3, 0.995),
    Phase(2500, 16, 1e-3, 0.995),
    Phase(600, 16, 4e-4, 0.995),
    Phase(800, 16, 1e-4, 0.99),
)


def frame_table(frames: int, channels: int) -> Tensor:
    """(1, F, C) sines and cosines of the frame's number, as in the original."""
    half = channels // 2
    frequencies = EMBEDDING_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(frames, dtype=torch.float64)[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)[None].float()


def fresh(model: DyLatteTransformer3DModel) -> None:
    """The original's start: xavier weights, and zeros where a branch must begin as nothing."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if "adaLN_modulation.1" in name or name == "final_layer.linear":
            nn.init.zeros_(module.weight)
    kernel = model.x_embedder.proj
    nn.init.xavier_uniform_(kernel.weight.view(len(kernel.weight), -1))
    nn.init.zeros_(kernel.bias)
    for table in (model.t_embedder.mlp[0], model.t_embedder.mlp[2], model.y_embedder.embedding_table):
        nn.init.normal_(table.weight, std=0.02)


def start(init: str, blocks: tuple[int, ...]) -> dict[str, Tensor]:
    """The state dict to begin with, in the original layout; ``blocks`` of the DiT become the spatial ones."""
    dit = read_checkpoint(builtin_path("dit_fmnist")).tensors
    width, channels, patch, _ = dit["x_embedder.proj.weight"].shape
    places = dit["pos_embed"].shape[1]
    torch.manual_seed(SEED)
    model = DyLatteTransformer3DModel(
        sample_size=math.isqrt(places) * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        num_layers=2 * len(blocks),
        num_attention_heads=HEADS,
        num_classes=len(dit["y_embedder.embedding_table.weight"]) - 1,
        num_frames=FRAMES,
    )
    with torch.no_grad():
        fresh(model)
        model.temp_embed.copy_(frame_table(FRAMES, width))
    state = {key: tensor for key, tensor in model.state_dict().items() if not is_ours(key)}
    # The table of places is a constant of the architecture.
    state["pos_embed"] = dit["pos_embed"]
    if init == "dit":
        spatial = {
            key.replace(f"blocks.{block}.", f"blocks.{2 * place}."): tensor
            for place, block in enumerate(blocks)
            for key, tensor in dit.items()
            if key.startswith(f"blocks.{block}.")
        }
        state |= {key: tensor for key, tensor in dit.items() if not key.startswith("blocks.")} | spatial
    return state


def train(model: Path, out: Path, data: str, phase: Phase, precision: Precision, *, last: bool) -> Path:
    """Run or resume one phase; the last one is measured as well. Returns the folder with the averaged weights."""
    average = out / "average"
    if average.exists():
        return average
    settings = FinetuneSection(
        model=str(model),
        data=data,
        out=out,
        steps=phase.steps,
        target_ratio=1,
        batch_size=phase.batch_size,
        seed=SEED,
        learning_rate=phase.learning_rate,
        max_grad_norm=1.0,
        mixed_precision=precision,
        ema_decay=phase.ema_decay,
        evaluate_every=0,
        checkpoint_every=50,
        resume=(out / "checkpoints").is_dir(),
    )
    run = prepare(settings)
    for report in run.steps():
        if report.step % 20 == 0:
            speed = report.images_per_second
            print(
                f"{out.name} {report.step}/{phase.steps}: loss {report.loss:.4f}, {speed:.1f} videos/s",
                flush=True,
            )
    if last:
        print(f"{out.name}: held-out loss {run.finish().held_out_loss:.5f}", flush=True)
        return out
    with artifact_folder(average) as folder:
        save_model(run.average.model, folder)
    return average


def static_half(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a run without routers, in half precision: half of the megabytes for rounding of one in 2,000."""
    state = load_model(folder, execution="static").state_dict()
    return {key: tensor.half().contiguous() for key, tensor in state.items() if not is_ours(key)}


def main() -> None:
    """Train, or go on training, and write ``latte_fmnist.pt``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, default=Path("runs/small-latte"))
    parser.add_argument("--init", choices=("dit", "random"), default="dit")
    parser.add_argument("--blocks", default="0,1,2,5", help="blocks of the DiT that become spatial ones")
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="bf16", help="of the forward pass"
    )
    parser.add_argument("--phases", help="steps:videos:rate:decay,... instead of the built-in ones")
    options = parser.parse_args()
    phases = PHASES
    if options.phases:
        parts = [part.split(":") for part in options.phases.split(",")]
        phases = tuple(
            Phase(int(steps), int(batch), float(rate), float(decay)) for steps, batch, rate, decay in parts
        )
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    data = f"moving-fashion-mnist:{options.data}"
    previous = out / "converted"
    if not previous.exists():
        first = out / "start.pt"
        torch.save({"ema": start(options.init, tuple(map(int, options.blocks.split(","))))}, first)
        convert(first, out=previous, family="latte", num_heads=HEADS)
    for number, phase in enumerate(phases, 1):
        previous = train(
            previous, out / f"phase{number}", data, phase, options.precision, last=phase is phases[-1]
        )
    written = out / "latte_fmnist.pt"
    with atomic_write(written) as temporary:
        torch.save({"ema": static_half(previous)}, temporary)
    facts = {"sha256": hashlib.sha256(written.read_bytes()).hexdigest(), "bytes": written.stat().st_size}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
