"""The card of an export that diffusers has no pipeline for: its parts, and the lines that sample with them. Tests run the code."""

from __future__ import annotations

from collections.abc import Sequence

from dydit_cli.export.card import Subject, dials_of, head, licence

GUIDANCE = 4.0

LOADED = {
    "With dydit installed": """import torch
import dydit_cli
from diffusers import DDIMScheduler

transformer = dydit_cli.load_model({folder}{dtype})
""",
    "With diffusers alone": """import torch
from diffusers import AutoModel, DDIMScheduler

# This runs transformer/modeling_dydit.py of the folder.
transformer = AutoModel.from_pretrained({folder}, subfolder="transformer", trust_remote_code=True{dtype})
""",
}

START = """scheduler = DDIMScheduler.from_pretrained({folder}, subfolder="scheduler")
scheduler.set_timesteps({steps})
videos = torch.randn(2, {shape}, generator=torch.manual_seed(0))
"""

GUIDED = """labels = torch.tensor([{first}, {second}])
without = torch.full_like(labels, {null})  # the null class
with torch.no_grad():
    for t in scheduler.timesteps:
        both = transformer(torch.cat([videos, videos]), t, torch.cat([labels, without])).sample
        conditional, unconditional = both[:, :, :{channels}].float().chunk(2)
        noise = unconditional + {guidance} * (conditional - unconditional)
        videos = scheduler.step(noise, t, videos).prev_sample
"""

UNGUIDED = """with torch.no_grad():
    for t in scheduler.timesteps:
        noise = transformer(videos, t).sample[:, :, :{channels}].float()
        videos = scheduler.step(noise, t, videos).prev_sample
"""


def parts_card(subject: Subject, *, needs_vae: bool, names: Sequence[str]) -> str:
    """The card.

    Args:
        subject: The model.
        needs_vae: Whether the model draws latents and the folder holds no autoencoder for them.
        names: Names of the classes by label.
    """
    snippets = "\n".join(
        f"### {heading}\n\n```python\n{code}```\n" for heading, code in parts_snippets(subject).items()
    )
    shape = ", ".join(map(str, ("B", *subject.geometry.sample_shape)))
    classes = (
        f"The classes: {', '.join(f'{label} {name}' for label, name in enumerate(names))}.\n" if names else ""
    )
    autoencoder = (
        "They are latents; decode them frame by frame with the autoencoder that the model was trained with."
        if needs_vae
        else "They are pixels in [-1, 1]."
        if subject.geometry.in_channels in (1, 3)
        else "They are latents; `vae/` decodes them frame by frame."
    )
    return (
        head(subject, subject.introduction, "library_name: diffusers\n", rate=subject.dials)
        + f"""
## Use

diffusers has no pipeline for this form of {subject.family.title} (its `LattePipeline` drives the text-to-video form alone). The folder
holds the transformer with its code and the scheduler; a few lines sample with them. Run the code below beside the folder
`{subject.name}`.

{snippets}
`videos` is ({shape}). {autoencoder}
{classes}
{dials_of(subject, "transformer")}{subject.limits}
The scheduler is DDIM; others that predict noise go by `from_config(scheduler.config)`. `dydit sample` offers DDPM with the learned
variance and writes MP4 files and GIFs.

"""
        + licence(subject, "dydit, and with it the file `modeling_dydit.py` in this folder,")
    )


def parts_snippets(subject: Subject) -> dict[str, str]:
    """Code for each way to load the parts, by heading; meant to run beside the folder."""
    geometry = subject.geometry
    facts = {
        "folder": f'"{subject.name}"',
        "dtype": "" if subject.dtype == "float32" else f", torch_dtype=torch.{subject.dtype}",
        "shape": ", ".join(map(str, geometry.sample_shape)),
        "channels": geometry.in_channels,
        "first": 0,
        "second": min(1, geometry.num_classes - 1),
        "null": geometry.num_classes,
        "guidance": GUIDANCE,
        "steps": subject.steps,
    }
    sampling = START + (GUIDED if geometry.num_classes else UNGUIDED)
    return {heading: (loaded + sampling).format(**facts) for heading, loaded in LOADED.items()}
