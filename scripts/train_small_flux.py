"""Train the small FLUX that the package ships, with the project's own `prepare` and `finetune`, from random weights.

    python scripts/train_small_flux.py --data FOLDER --work runs/train-flux

FOLDER holds the four IDX files of Fashion-MNIST. The model has 2 double and 3 single blocks of 96 channels on 49 tokens; its text
encoders are the shipped random ones (`scripts/make_small_pipeline.py`). A first run at a high learning rate and a second at a lower
one, both on the data's own targets (``loss: denoising``) with everything on (``target_ratio: 1``). A killed script goes on where it
was when it is started again. The averaged weights are written in the original FLUX layout, in half precision, beside the other
shipped models, and its facts into ``models.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dydit_cli.artifacts import load_model, save_model
from dydit_cli.families.flux import DyFluxTransformer2DModel
from dydit_cli.families.registry import family_named
from dydit_cli.preparation.prepare import prepare
from dydit_cli.recipe.schema import FinetuneSection, PrepareSection
from dydit_cli.training import prepare as prepare_training

SEED = 0
CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 24,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": False,
    "axes_dims_rope": [4, 10, 10],
    "sample_size": 14,
    "text_tokens": 7,
}
CAPTION = "a {class} | a photo of a {class} | {class}"
PHASES = ((1.5e-3, 0.995), (3e-4, 0.995))
"""Learning rate and decay of the moving average of each run."""
ASSETS = Path(__file__).parent.parent / "dydit_cli" / "assets" / "models"
NAME = "flux_fmnist"


def fresh_model() -> DyFluxTransformer2DModel:
    """Random weights; every modulation and the last layer start at zero, as in DiT (adaLN-Zero), so that blocks begin as nothing."""
    torch.manual_seed(SEED)
    model = family_named("flux").build(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_router." in name:
                continue
            modulation = (
                ".norm1" in name or ".norm.linear" in name or name.startswith(("norm_out", "proj_out"))
            )
            if modulation or name.endswith(".bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                torch.nn.init.xavier_uniform_(parameter)
    return model


def run_phase(model: Path, out: Path, data: Path, steps: int, learning_rate: float, ema_decay: float) -> None:
    """One run of `finetune`, or the rest of one."""
    begun = (out / "checkpoints").is_dir()
    settings = FinetuneSection(
        model=str(model),
        data=str(data),
        out=out,
        steps=steps,
        target_ratio=1.0,
        loss="denoising",
        batch_size=64,
        seed=SEED,
        learning_rate=learning_rate,
        ema_decay=ema_decay,
        max_grad_norm=1.0,
        log_every=50,
        evaluate_every=400,
        evaluate_images=200,
        checkpoint_every=200,
        device="cpu",
        resume=begun,
        overwrite=not begun,
    )
    run = prepare_training(settings)
    for report in run.steps():
        if report.step % 100 == 0:
            held_out = (
                "" if report.ema_loss is None else f", averaged {report.ema_loss:.4f} on held-out images"
            )
            print(
                f"step {report.step}: loss {report.loss:.4f}, {report.images_per_second:.0f} images/s{held_out}",
                flush=True,
            )
    run.finish()


def ship(trained: Path, steps: list[int]) -> None:
    """Write the averaged weights in the original layout, and the facts."""
    model = load_model(trained, execution="static")
    static = {
        key: value
        for key, value in model.state_dict().items()
        if "_router." not in key and "_order" not in key
    }
    original = family_named("flux").write(static)
    tensors = {key: original[key].half().contiguous() for key in original}
    path = ASSETS / f"{NAME}.safetensors"
    save_file(tensors, path)
    path.chmod(0o644)
    facts = json.loads((ASSETS / "models.json").read_text(encoding="utf-8"))
    facts[path.name] = {
        "family": "flux",
        "trained_with": "scripts/train_small_flux.py (dydit finetune, target ratio 1, rectified flow, logit-normal timesteps)",
        "steps": sum(steps),
        "batch_size": 64,
        "pipeline": f"builtin:{NAME}",
        "config": {
            "num_heads": CONFIG["num_attention_heads"],
            "axes_dims_rope": CONFIG["axes_dims_rope"],
            "sample_size": CONFIG["sample_size"],
            "text_tokens": CONFIG["text_tokens"],
        },
    }
    lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in facts.items()]
    (ASSETS / "models.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Parse the arguments, prepare, train and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--steps", type=int, nargs=2, default=(1800, 450), help="of the two runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ship", action="store_true", help="write into the package")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work: Path = arguments.work
    cache, start = work / "cache", work / "start"
    if not (cache / "cache.json").exists():
        prepare(
            PrepareSection(
                data=str(arguments.data),
                out=cache,
                pipeline=f"builtin:{NAME}",
                caption=CAPTION,
                resolution=(28,),
                buckets=False,
                batch_size=256,
                device="cpu",
                resume=cache.exists(),
            )
        )
    if not start.exists():
        save_model(fresh_model(), start)
    model = start
    for number, (steps, (learning_rate, ema_decay)) in enumerate(
        zip(arguments.steps, PHASES, strict=True), start=1
    ):
        out = work / f"phase{number}"
        run_phase(model, out, cache, steps, learning_rate, ema_decay)
        model = out
    if arguments.ship:
        ship(model, list(arguments.steps))


if __name__ == "__main__":
    main()
