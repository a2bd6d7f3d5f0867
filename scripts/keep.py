"""Keep an artifact and a recipe of today in the tests, which must load for ever.

    python scripts/keep.py 0.1        # writes tests/kept/0.1; refuses to touch what was kept before

Run it once a release, and whenever the form of artifacts or recipes has changed. What is kept is never made anew: it stands for
the files that users have.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "tests" / "kept"
CONFIG = {
    "sample_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_classes": 3,
    "num_groups": 4,
}
SECTIONS = {
    "prepare": {"data": "pictures", "out": "cache", "pipeline": "pipeline"},
    "convert": {"checkpoint": "DiT-XL-2-256x256.pt", "out": "runs/converted", "family": "dit"},
    "finetune": {"data": "cache", "out": "runs/trained", "steps": 1000},
    "profile": {"out": "runs/profile"},
    "sample": {"out": "runs/samples"},
    "evaluate": {"out": "runs/evaluation", "model": "runs/trained", "reference": "reference.npz"},
    "export": {"out": "runs/export"},
}


def keep(name: str) -> Path:
    """Write the artifact, the recipe, and what the model predicts today.

    Args:
        name: Of the version.
    """
    import torch
    import yaml
    from safetensors.torch import save_file

    from dydit_cli.artifacts import artifact_folder, load_model, save_model
    from dydit_cli.conversion.convert import convert
    from dydit_cli.conversion.insertion import is_ours
    from dydit_cli.families.registry import family_named
    from dydit_cli.recipe.loading import load_recipe

    generator = torch.Generator().manual_seed(0)
    made = family_named("dit").build(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    with artifact_folder(KEPT / name) as folder, tempfile.TemporaryDirectory() as place:
        # Relative paths, so that nothing in the artifact tells where it was made.
        os.chdir(place)
        torch.save({key: value for key, value in made.state_dict().items() if not is_ours(key)}, "model.pt")
        convert("model.pt", out="converted", family="dit", num_heads=2, num_groups=4)
        model = load_model("converted", execution="dense")
        with torch.no_grad():
            for parameter in model.router_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        save_model(model, Path("converted"))
        samples = torch.randn(4, 1, 8, 8, generator=generator)
        times, labels = torch.tensor([10.0, 300.0, 700.0, 990.0]), torch.tensor([0, 1, 2, 3])
        with torch.no_grad():
            prediction, routing = model.denoise(samples, times, labels)
        expected = {
            "samples": samples,
            "times": times,
            "labels": labels,
            "prediction": prediction,
            "heads": routing.heads.contiguous(),
            "groups": routing.groups.contiguous(),
            "tokens": routing.tokens.contiguous(),
        }
        save_file(expected, folder / "expected.safetensors")
        Path("converted").rename(folder / "artifact")
        Path("recipe.yaml").write_text(yaml.safe_dump({"schema": 1, **SECTIONS}, sort_keys=False))
        (folder / "recipe.yaml").write_text(load_recipe("recipe.yaml").to_yaml(), encoding="utf-8")
        os.chdir(ROOT)
    return KEPT / name


def main() -> None:
    """Keep today's forms under a name."""
    sys.path.insert(0, str(ROOT))
    if len(sys.argv) != 2:
        raise SystemExit("usage: python scripts/keep.py VERSION")
    print(f"kept in {keep(sys.argv[1]).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
