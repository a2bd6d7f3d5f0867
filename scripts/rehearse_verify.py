"""Go through the rows of recipes/verify at full size with random weights: python scripts/rehearse_verify.py FOLDER

Nobody has the published files here, so their shapes are filled with random numbers: a checkpoint of 675 million parameters in the original
layout (of the dynamic rows with routers under the authors' names), an autoencoder of Stable Diffusion's size, an Inception network, and
statistics to compare with. Then each row is what docs/verify.md says, `dydit convert` and `dydit evaluate`, with two images and a few
steps in place of 50,000 and 250. The numbers that come out mean nothing; that files of these sizes and names go all the way does.

    python scripts/rehearse_verify.py runs/rehearsal --table docs/verify.md

A row takes some minutes on one CPU core, 8 GB of memory, and 6 GB in FOLDER until it is done.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dydit_cli.evaluation.extractors.inception_network import InceptionNetwork
from dydit_cli.families.original_dit import write as original_names
from dydit_cli.families.registry import preset_named
from dydit_cli.recipe.builtin import builtin_recipes
from dydit_cli.recipe.loading import load_recipe
from dydit_cli.recipe.schema import ConvertSection, EvaluateSection
from scripts.pages import replace_between

BEGIN, END = "<!-- rehearsed: begin -->", "<!-- rehearsed: end -->"
ROWS = tuple(recipe.name for recipe in builtin_recipes() if recipe.name.startswith("verify/"))
STABLE_DIFFUSION_VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}
FEATURES = 2048
SCALE = 0.02
"""Standard deviation of the random weights."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--steps", type=int, default=4, help="of the sampler; the rows have 250")
    parser.add_argument("--table", type=Path, help="a page that gets the table")
    options = parser.parse_args()
    torch.manual_seed(0)
    options.folder.mkdir(parents=True, exist_ok=True)
    write_surroundings(options.folder)
    found = [rehearse(name, options.folder, options.steps) for name in options.only]
    text = table(found, options.steps)
    print(text)
    if options.table is not None:
        replace_between(options.table, BEGIN, END, text)


def write_surroundings(folder: Path) -> None:
    """What the rows need beside a checkpoint, under the names that their recipes give it."""
    row = section(ROWS[0], EvaluateSection)
    AutoencoderKL(**STABLE_DIFFUSION_VAE).save_pretrained(folder / str(row.vae))
    torch.save(InceptionNetwork().state_dict(), folder / str(row.extractor))
    np.savez(folder / str(row.reference), mu=np.zeros(FEATURES), sigma=np.eye(FEATURES))


def section(name: str, kind: type[Any]) -> Any:
    """A section of a row's recipe."""
    return load_recipe(name).get(kind)


def random_checkpoint(family: str, *, dynamic: bool) -> dict[str, Tensor]:
    """A state dict of the published size in the original layout, about half of whose units are on where it is dynamic."""
    found, config = preset_named(f"{family}-xl/2")
    with torch.device("meta"):
        model = found.model_class(**config)
    state = {}
    for key, tensor in model.state_dict().items():
        if key.endswith("_order") or ("_router." in key and not dynamic):
            continue
        state[key] = torch.randn(tensor.shape) * (
            1.0 if "_router." in key and key.endswith("bias") else SCALE
        )
    return original_names(state)


def rehearse(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Run a row's two commands, and say what they gave."""
    convert = section(name, ConvertSection)
    work = folder / name.removeprefix("verify/")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    state = random_checkpoint(convert.family, dynamic="dydit" in name)
    parameters = sum(tensor.numel() for tensor in state.values())
    # As their training scripts save them: the averaged weights among others.
    torch.save({"ema": state} if "dydit" in name else state, work / convert.checkpoint)
    del state
    dydit("convert", name, f"checkpoint={work / convert.checkpoint}", f"out={work / 'converted'}")
    (work / convert.checkpoint).unlink()
    row = section(name, EvaluateSection)
    dydit(
        *("evaluate", name, f"model={work / 'converted'}", f"out={work / 'evaluation'}"),
        *("num_images=2", "batch_size=2", f"steps={steps}"),
        *(f"{key}={folder / str(getattr(row, key))}" for key in ("vae", "extractor", "reference")),
    )
    result = json.loads((work / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    shutil.rmtree(work)
    return {"name": name, "parameters": parameters, "result": result}


def dydit(*words: str) -> None:
    """Run a command of the project, which shows its own progress.

    Raises:
        SystemExit: If it fails.
    """
    print("dydit", *words, flush=True)
    if subprocess.run([sys.executable, "-m", "dydit_cli", *words], check=False).returncode:
        raise SystemExit(f"dydit {words[0]} {words[1]} failed; its message stands above")


def table(rows: list[dict[str, Any]], steps: int) -> str:
    """As Markdown."""
    first = rows[0]["result"]
    lines = [
        f"Random weights at full size, 2 images of 256 × 256, {steps} of the 250 steps, on {first['device']}, torch "
        f"{first['versions']['torch']}, diffusers {first['versions']['diffusers']}:",
        "",
        "| recipe | parameters in the file | GMACs a forward, executed |",
        "| --- | ---: | ---: |",
    ]
    lines += [
        f"| `{row['name']}` | {row['parameters']:,} | {row['result']['cost']['mmacs'] / 1000:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
